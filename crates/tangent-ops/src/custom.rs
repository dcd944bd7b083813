//! Operations with hand-written backward passes: the one place that speaks Burn's extension API.

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, DispatchDevice, Flex, backend_extension};
use burn::tensor::{Bytes, DType, Shape, Tensor};

use crate::profile::{self, Kind};

/// A contiguous row-major `f32` matrix as kernels see it. Cloning shares the buffer.
#[derive(Clone, Debug)]
pub(crate) struct Matrix(FlexTensor);

impl Matrix {
    /// Takes `values` as `(rows, cols)`.
    pub(crate) fn new(values: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "one value per element");
        let layout = Layout::contiguous(Shape::from(vec![rows, cols]));
        Self(FlexTensor::new(
            Bytes::from_elems(values),
            layout,
            DType::F32,
        ))
    }

    fn from_tensor(tensor: FlexTensor) -> Self {
        // A view into a larger buffer is copied so that kernels may take the whole storage.
        let exact = tensor.is_contiguous()
            && tensor.layout().start_offset() == 0
            && tensor.bytes().len() == tensor.layout().num_elements() * size_of::<f32>();
        Self(if exact {
            tensor
        } else {
            tensor.to_contiguous()
        })
    }

    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.0.layout().shape()[0]
    }

    /// Number of columns.
    pub(crate) fn cols(&self) -> usize {
        self.0.layout().shape()[1]
    }

    /// Values in row-major order.
    pub(crate) fn values(&self) -> &[f32] {
        &self.0.storage::<f32>()[..self.rows() * self.cols()]
    }
}

/// An operation on `(rows, cols)` matrices with a CPU kernel and its derivative.
pub(crate) trait CpuOp: Debug + Send + Sync + 'static {
    /// Name in profiles; empty where it takes no time.
    fn name(&self) -> &'static str;

    /// The output and, when `tracked`, what [`CpuOp::backward`] needs.
    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>);

    /// Gradients of the inputs from the gradient of the output. `needed[i]` says whether input
    /// `i` wants one; the others may be `None`.
    fn backward(
        &self,
        saved: Vec<Matrix>,
        d_output: Matrix,
        needed: &[bool],
    ) -> Vec<Option<Matrix>>;
}

type SharedOp = Arc<dyn CpuOp>;

fn forward(op: &SharedOp, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
    timed(op, Kind::Forward, || op.forward(inputs, tracked))
}

fn timed<R>(op: &SharedOp, kind: Kind, run: impl FnOnce() -> R) -> R {
    match op.name() {
        "" => run(),
        name => profile::span(name, kind, run),
    }
}

/// Whether tensors of this device are served by the CPU kernels (otherwise by the definitions).
pub(crate) fn has_kernels(x: &Tensor<2>) -> bool {
    matches!(
        x.device().without_autodiff().as_dispatch(),
        DispatchDevice::Flex(_)
    )
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait CpuExtension: Backend {
    fn cpu_op_1(a: FloatTensor<Self>, op: SharedOp) -> FloatTensor<Self>;
    fn cpu_op_2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: SharedOp) -> FloatTensor<Self>;
    fn cpu_op_3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self>;
    fn cpu_op_4(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self>;
    fn cpu_op_5(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self>;
    #[allow(
        clippy::too_many_arguments,
        reason = "the macro takes tensors one by one"
    )]
    fn cpu_op_7(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        f: FloatTensor<Self>,
        g: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self>;
}

fn run(inputs: Vec<FlexTensor>, op: &SharedOp) -> FlexTensor {
    let inputs: Vec<Matrix> = inputs.into_iter().map(Matrix::from_tensor).collect();
    forward(op, &inputs, false).0.0
}

impl CpuExtension for Flex {
    fn cpu_op_1(a: FlexTensor, op: SharedOp) -> FlexTensor {
        run(vec![a], &op)
    }

    fn cpu_op_2(a: FlexTensor, b: FlexTensor, op: SharedOp) -> FlexTensor {
        run(vec![a, b], &op)
    }

    fn cpu_op_3(a: FlexTensor, b: FlexTensor, c: FlexTensor, op: SharedOp) -> FlexTensor {
        run(vec![a, b, c], &op)
    }

    fn cpu_op_4(
        a: FlexTensor,
        b: FlexTensor,
        c: FlexTensor,
        d: FlexTensor,
        op: SharedOp,
    ) -> FlexTensor {
        run(vec![a, b, c, d], &op)
    }

    fn cpu_op_5(
        a: FlexTensor,
        b: FlexTensor,
        c: FlexTensor,
        d: FlexTensor,
        e: FlexTensor,
        op: SharedOp,
    ) -> FlexTensor {
        run(vec![a, b, c, d, e], &op)
    }

    fn cpu_op_7(
        a: FlexTensor,
        b: FlexTensor,
        c: FlexTensor,
        d: FlexTensor,
        e: FlexTensor,
        f: FlexTensor,
        g: FlexTensor,
        op: SharedOp,
    ) -> FlexTensor {
        run(vec![a, b, c, d, e, f, g], &op)
    }
}

/// The backward step of any [`CpuOp`] with `N` inputs.
#[derive(Debug)]
struct Step<const N: usize>;

impl<const N: usize> Backward<Flex, N> for Step<N> {
    type State = (SharedOp, Vec<Matrix>);

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let d_output = Matrix::from_tensor(grads.consume::<Flex>(&ops.node));
        let needed = ops.parents.each_ref().map(Option::is_some);
        let (op, saved) = ops.state;
        let d_inputs = timed(&op, Kind::Backward, || {
            op.backward(saved, d_output, &needed)
        });
        debug_assert_eq!(d_inputs.len(), N);
        for (parent, d_input) in ops.parents.into_iter().zip(d_inputs) {
            if let (Some(parent), Some(d_input)) = (parent, d_input) {
                grads.register::<Flex>(parent.id, d_input.0);
            }
        }
    }
}

fn run_tracked<const N: usize, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<Flex, C>>; N],
    op: SharedOp,
) -> FloatTensor<Autodiff<Flex, C>> {
    let (primitives, nodes): (Vec<_>, Vec<_>) = inputs
        .into_iter()
        .map(|input| {
            let (primitive, node) = input.into_parts();
            (Matrix::from_tensor(primitive), node)
        })
        .unzip();
    let nodes = nodes
        .try_into()
        .unwrap_or_else(|_| unreachable!("one node for each of N inputs"));
    match Step::<N>.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (output, saved) = forward(&op, &primitives, true);
            prep.finish((op, saved), output.0)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward(&op, &primitives, false).0.0),
    }
}

impl<C: CheckpointStrategy> CpuExtension for Autodiff<Flex, C> {
    fn cpu_op_1(a: FloatTensor<Self>, op: SharedOp) -> FloatTensor<Self> {
        run_tracked::<1, C>([a], op)
    }

    fn cpu_op_2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: SharedOp) -> FloatTensor<Self> {
        run_tracked::<2, C>([a, b], op)
    }

    fn cpu_op_3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self> {
        run_tracked::<3, C>([a, b, c], op)
    }

    fn cpu_op_4(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self> {
        run_tracked::<4, C>([a, b, c, d], op)
    }

    fn cpu_op_5(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self> {
        run_tracked::<5, C>([a, b, c, d, e], op)
    }

    fn cpu_op_7(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        e: FloatTensor<Self>,
        f: FloatTensor<Self>,
        g: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self> {
        run_tracked::<7, C>([a, b, c, d, e, f, g], op)
    }
}

/// Applies `op` to one to five tensors, or seven.
pub(crate) fn apply<const N: usize>(op: impl CpuOp, inputs: [Tensor<2>; N]) -> Tensor<2> {
    const { assert!(matches!(N, 1..=5 | 7), "no operation takes as many") };
    apply_to(op, inputs.into())
}

/// [`apply`] to as many tensors as are known at run time only.
///
/// # Panics
/// If there are as many as no operation takes.
pub(crate) fn apply_to(op: impl CpuOp, inputs: Vec<Tensor<2>>) -> Tensor<2> {
    let (count, op): (usize, SharedOp) = (inputs.len(), Arc::new(op));
    let mut inputs = inputs.into_iter().map(Tensor::into_dispatch);
    let mut x = || inputs.next().expect("as many as were counted");
    Tensor::from_dispatch(match count {
        1 => Dispatch::cpu_op_1(x(), op),
        2 => Dispatch::cpu_op_2(x(), x(), op),
        3 => Dispatch::cpu_op_3(x(), x(), x(), op),
        4 => Dispatch::cpu_op_4(x(), x(), x(), x(), op),
        5 => Dispatch::cpu_op_5(x(), x(), x(), x(), x(), op),
        7 => Dispatch::cpu_op_7(x(), x(), x(), x(), x(), x(), x(), op),
        _ => panic!("no operation takes {count} tensors"),
    })
}
