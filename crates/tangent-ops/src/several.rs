//! Operations with several outputs, made of operations with one.
//!
//! A node of the graph has one output. That of such an operation is a `(1, 1)` token. Nodes that
//! take the token give the outputs, and leave their gradients where the operation finds them: in
//! the backward pass it comes after all of them, since the graph is walked from its deepest nodes
//! up, and they lie one below the token.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::custom::{self, CpuOp, Matrix};

/// An operation on `(rows, cols)` matrices with `N` outputs, and its derivative.
pub(crate) trait SeveralOp<const N: usize>: std::fmt::Debug + Send + Sync + 'static {
    /// Name in profiles.
    fn name(&self) -> &'static str;

    /// The outputs and, when `tracked`, what [`backward`](Self::backward) needs.
    fn forward(&self, inputs: &[Matrix], tracked: bool) -> ([Matrix; N], Vec<Matrix>);

    /// Gradients of the inputs from those of the outputs; an output that nothing depends on has
    /// none. Every input `i` with `needed[i]` must get one, zeros if need be; the others may be
    /// `None`.
    fn backward(
        &self,
        saved: Vec<Matrix>,
        d_outputs: [Option<Matrix>; N],
        needed: &[bool],
    ) -> Vec<Option<Matrix>>;
}

/// Applies `op` to tensors, of which there may be as many as [`custom::apply_to`] can take.
pub(crate) fn apply<const N: usize>(
    op: impl SeveralOp<N>,
    inputs: Vec<Tensor<2>>,
) -> [Tensor<2>; N] {
    let slots = Arc::new(Slots(Mutex::new(None)));
    let joined = Joined {
        op,
        slots: slots.clone(),
    };
    let token = custom::apply_to(joined, inputs);
    std::array::from_fn(|index| {
        let output = Output {
            index,
            slots: slots.clone(),
        };
        custom::apply(output, [token.clone()])
    })
}

/// Where outputs, and later their gradients, wait to be taken. Nothing is there before the forward
/// pass, and after the operation's turn in the backward pass.
#[derive(Debug)]
struct Slots<const N: usize>(Mutex<Option<[Option<Matrix>; N]>>);

impl<const N: usize> Slots<N> {
    /// What the slots hold from now on, for what they held.
    fn replace(&self, with: Option<[Option<Matrix>; N]>) -> Option<[Option<Matrix>; N]> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *slots, with)
    }

    /// What one slot holds from now on, for what it held.
    ///
    /// # Panics
    /// If the operation's turn is over: a gradient would be lost.
    fn replace_one(&self, index: usize, with: Option<Matrix>) -> Option<Matrix> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slots = slots.as_mut().expect("outputs come before their operation");
        std::mem::replace(&mut slots[index], with)
    }
}

fn token() -> Matrix {
    Matrix::new(vec![0.0], 1, 1)
}

/// The operation, whose output is the token.
#[derive(Debug)]
struct Joined<Op, const N: usize> {
    op: Op,
    slots: Arc<Slots<N>>,
}

impl<Op: SeveralOp<N>, const N: usize> CpuOp for Joined<Op, N> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let (outputs, saved) = self.op.forward(inputs, tracked);
        self.slots.replace(Some(outputs.map(Some)));
        (token(), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, _: Matrix, needed: &[bool]) -> Vec<Option<Matrix>> {
        let d_outputs = self.slots.replace(None);
        let d_outputs = d_outputs.unwrap_or_else(|| std::array::from_fn(|_| None));
        self.op.backward(saved, d_outputs, needed)
    }
}

/// One output of an operation, from its token.
#[derive(Debug)]
struct Output<const N: usize> {
    index: usize,
    slots: Arc<Slots<N>>,
}

impl<const N: usize> CpuOp for Output<N> {
    fn name(&self) -> &'static str {
        ""
    }

    fn forward(&self, _token: &[Matrix], _tracked: bool) -> (Matrix, Vec<Matrix>) {
        let output = self.slots.replace_one(self.index, None);
        (output.expect("an output is taken once"), vec![])
    }

    fn backward(&self, _: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        self.slots.replace_one(self.index, Some(dy));
        vec![Some(token())]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// `(2 x, x * y)`, and which outputs had gradients.
    #[derive(Debug, Default)]
    struct TwiceAndProduct(Arc<Mutex<Vec<bool>>>);

    fn each(a: &Matrix, b: &Matrix, f: impl Fn(f32, f32) -> f32) -> Matrix {
        let values = a.values().iter().zip(b.values());
        let values = values.map(|(a, b)| f(*a, *b)).collect();
        Matrix::new(values, a.rows(), a.cols())
    }

    impl SeveralOp<2> for TwiceAndProduct {
        fn name(&self) -> &'static str {
            "twice_and_product"
        }

        fn forward(&self, inputs: &[Matrix], _: bool) -> ([Matrix; 2], Vec<Matrix>) {
            let [x, y] = inputs else { unreachable!() };
            let outputs = [each(x, x, |a, b| a + b), each(x, y, |a, b| a * b)];
            (outputs, inputs.to_vec())
        }

        fn backward(
            &self,
            saved: Vec<Matrix>,
            d_outputs: [Option<Matrix>; 2],
            _: &[bool],
        ) -> Vec<Option<Matrix>> {
            *self.0.lock().unwrap() = d_outputs.iter().map(Option::is_some).collect();
            let zeros = || each(&saved[0], &saved[0], |_, _| 0.0);
            let [twice, product] = d_outputs.map(|d| d.unwrap_or_else(zeros));
            let by_y = each(&product, &saved[1], |d, y| d * y);
            vec![
                Some(each(&twice, &by_y, |a, b| 2.0 * a + b)),
                Some(each(&product, &saved[0], |d, x| d * x)),
            ]
        }
    }

    fn inputs() -> [Tensor<2>; 2] {
        let device = Device::flex().autodiff();
        let tensor = |values: &[f32]| crate::tensor(values.to_vec(), 1, 2, &device);
        [tensor(&[3.0, 5.0]), tensor(&[0.5, 0.25])].map(Tensor::require_grad)
    }

    #[test]
    fn gradients_of_all_outputs_meet() {
        let [x, y] = inputs();
        let seen = Arc::default();
        let op = TwiceAndProduct(Arc::clone(&seen));
        let [twice, product] = apply(op, vec![x.clone(), y.clone()]);
        assert_eq!(crate::values(twice.clone()), [6.0, 10.0]);
        assert_eq!(crate::values(product.clone()), [1.5, 1.25]);
        // Each output is used, one of them twice, and not equally deep in the graph.
        let loss = (twice * 10.0 + product.clone() + (product * 2.0).exp().log()).sum();
        let gradients = loss.backward();
        let of = |t: &Tensor<2>| crate::values(t.grad(&gradients).unwrap());
        crate::check::close(&of(&x), &[20.0 + 3.0 * 0.5, 20.0 + 3.0 * 0.25], 1e-5);
        crate::check::close(&of(&y), &[9.0, 15.0], 1e-5);
        assert_eq!(*seen.lock().unwrap(), [true, true]);
    }

    #[test]
    fn an_output_without_use_has_no_gradient() {
        let [x, y] = inputs();
        let seen = Arc::default();
        let op = TwiceAndProduct(Arc::clone(&seen));
        let [twice, _] = apply(op, vec![x.clone(), y.clone()]);
        let gradients = twice.sum().backward();
        assert_eq!(crate::values(x.grad(&gradients).unwrap()), [2.0, 2.0]);
        assert_eq!(*seen.lock().unwrap(), [true, false]);
    }

    #[test]
    fn untracked_outputs_are_values_alone() {
        let [x, y] = inputs().map(|t| t.without_autodiff());
        let [twice, product] = apply(TwiceAndProduct::default(), vec![x, y]);
        assert_eq!(crate::values(twice), [6.0, 10.0]);
        assert_eq!(crate::values(product), [1.5, 1.25]);
    }
}
