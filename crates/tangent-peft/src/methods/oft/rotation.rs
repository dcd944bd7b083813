//! From the upper triangle of a skew-symmetric matrix to a rotation, and its derivative.

use burn::tensor::{Device, Int, Tensor, TensorData};
use rayon::prelude::*;

/// How a rotation follows from a skew-symmetric matrix.
pub(super) enum Cayley {
    Exact,
    /// By so many terms.
    Series(usize),
}

impl Cayley {
    /// Matrices of every block that are kept for the backward pass, the rotation among them.
    pub(super) fn kept(&self) -> usize {
        match self {
            // The inverse besides.
            Self::Exact => 2,
            // Powers of Q up to the last but one.
            Self::Series(terms) => last_power(*terms),
        }
    }

    /// Products of matrices of a block in a forward and a backward pass.
    pub(super) fn products(&self) -> usize {
        match self {
            // The inverse, two products with it, and the gradient of each.
            Self::Exact => 5,
            // A product for each power, and two gradients of it.
            Self::Series(terms) => 3 * (last_power(*terms) - 1),
        }
    }
}

/// The exponent of the last power in a series of so many terms.
fn last_power(terms: usize) -> usize {
    match terms {
        ..=2 => 1,
        _ => (terms - 1).max(3),
    }
}

/// The map from upper triangles to rotations of one size.
pub(super) struct Rotations {
    size: usize,
    cayley: Cayley,
    /// Where in the upper triangle each entry of the matrix is.
    index: Tensor<1, Int>,
    /// 1 above the diagonal, -1 below, 0 on it.
    sign: Tensor<2>,
    /// `(1, size, size)`.
    identity: Tensor<3>,
}

impl Rotations {
    pub(super) fn new(size: usize, cayley: Cayley, device: &Device) -> Self {
        let (mut index, mut sign) = (vec![0i32; size * size], vec![0f32; size * size]);
        let above = (0..size).flat_map(|row| (row + 1..size).map(move |col| (row, col)));
        for (at, (row, col)) in (0i32..).zip(above) {
            for (entry, value) in [(row * size + col, 1.0), (col * size + row, -1.0)] {
                (index[entry], sign[entry]) = (at, value);
            }
        }
        let index = TensorData::new(index, [size * size]);
        let ones = (0..size * size).map(|entry| f32::from(entry.is_multiple_of(size + 1)));
        let identity = tangent_ops::tensor(ones.collect(), size, size, device);
        Self {
            size,
            cayley,
            index: Tensor::from_data(index, device),
            sign: tangent_ops::tensor(sign, 1, size * size, device),
            identity: identity.reshape([1, size, size]),
        }
    }

    /// `(blocks, size, size)` from `upper: (blocks, size * (size - 1) / 2)`.
    pub(super) fn of(&self, upper: Tensor<2>) -> Tensor<3> {
        let q = self.skew(upper);
        match self.cayley {
            Cayley::Exact => exact(q, self.identity.clone()),
            Cayley::Series(terms) => series(q, self.identity.clone(), terms),
        }
    }

    /// The skew-symmetric matrices with these upper triangles.
    fn skew(&self, upper: Tensor<2>) -> Tensor<3> {
        let [blocks, _] = upper.dims();
        let entries = upper.select(1, self.index.clone()) * self.sign.clone();
        entries.reshape([blocks, self.size, self.size])
    }
}

/// `I + 2 Q + 2 Q^2 + ...`, the last power once, as PEFT adds them up: two terms are `I + 2 Q`, and
/// three have the fourth as well.
fn series(q: Tensor<3>, identity: Tensor<3>, terms: usize) -> Tensor<3> {
    let mut sum = identity + q.clone() * 2.0;
    let last = last_power(terms);
    let mut power = q.clone();
    for exponent in 2..=last {
        power = power.matmul(q.clone());
        let times = if exponent == last { 1.0 } else { 2.0 };
        sum = sum + power.clone() * times;
    }
    sum
}

/// `(I - Q)(I + Q)^-1 = 2 M - I` with `M = (I + Q)^-1`.
///
/// M is computed outside of the graph. In the graph it is `M - M (Q - Q') M` with a constant
/// `Q' = Q`, which has its value and exactly its derivative, `-M dQ M`.
fn exact(q: Tensor<3>, identity: Tensor<3>) -> Tensor<3> {
    let [blocks, size, _] = q.dims();
    let device = q.device().without_autodiff();
    let constant = q.clone().without_autodiff();
    let inverse = inverses(tangent_ops::values(constant.clone()), size);
    let inverse = tangent_ops::tensor(inverse, blocks * size, size, &device);
    let inverse: Tensor<3> = inverse.reshape([blocks, size, size]);
    let moved = inverse.clone().matmul(q - constant).matmul(inverse.clone());
    (inverse - moved) * 2.0 - identity
}

/// `(I + Q)^-1` of skew-symmetric `(size, size)` matrices Q, one after another.
fn inverses(mut matrices: Vec<f32>, size: usize) -> Vec<f32> {
    let each = matrices.par_chunks_exact_mut(size * size);
    each.for_each(|matrix| {
        let mut shifted: Vec<f64> = matrix.iter().map(|v| f64::from(*v)).collect();
        shifted.iter_mut().step_by(size + 1).for_each(|v| *v += 1.0);
        invert(&mut shifted, size);
        for (narrow, wide) in matrix.iter_mut().zip(shifted) {
            *narrow = wide as f32;
        }
    });
    matrices
}

/// Gauss-Jordan elimination in place of a matrix `I + Q`. `x^T (I + Q) x = |x|^2`, and what is left
/// after each step has at least as much, so no pivot is below 1 and no rows are exchanged.
fn invert(matrix: &mut [f64], size: usize) {
    for pivot in 0..size {
        let scale = matrix[pivot * size + pivot].recip();
        matrix[pivot * size + pivot] = 1.0;
        let row = &mut matrix[pivot * size..][..size];
        row.iter_mut().for_each(|v| *v *= scale);
        let row = row.to_vec();
        for (at, other) in matrix.chunks_exact_mut(size).enumerate() {
            if at == pivot {
                continue;
            }
            let factor = std::mem::take(&mut other[pivot]);
            for (v, r) in other.iter_mut().zip(&row) {
                *v -= factor * r;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 4;

    /// One block of rotations, and its Q.
    fn rotation(cayley: Cayley, scale: f32) -> (Tensor<2>, Tensor<2>) {
        let device = Device::flex();
        let upper = [3.0, -1.0, 2.0, 5.0, -4.0, 1.0].map(|v: f32| v * scale);
        let upper = tangent_ops::tensor(upper.to_vec(), 1, 6, &device);
        let rotations = Rotations::new(SIZE, cayley, &device);
        let flat = |block: Tensor<3>| -> Tensor<2> { block.reshape([SIZE, SIZE]) };
        (
            flat(rotations.of(upper.clone())),
            flat(rotations.skew(upper)),
        )
    }

    fn identity() -> Tensor<2> {
        Tensor::eye(SIZE, &Device::flex())
    }

    #[track_caller]
    fn close(got: Tensor<2>, want: Tensor<2>, tolerance: f32) {
        let difference = tangent_ops::values(got - want);
        let worst = difference.iter().fold(0f32, |a, v| a.max(v.abs()));
        assert!(worst <= tolerance, "{worst}");
    }

    #[test]
    fn triangles_are_read_row_by_row() {
        let (_, q) = rotation(Cayley::Exact, 1.0);
        #[rustfmt::skip]
        let want = [
            0.0, 3.0, -1.0, 2.0,
            -3.0, 0.0, 5.0, -4.0,
            1.0, -5.0, 0.0, 1.0,
            -2.0, 4.0, -1.0, 0.0,
        ];
        assert_eq!(tangent_ops::values(q), want);
    }

    #[test]
    fn the_exact_map_is_a_rotation() {
        for scale in [0.1, 1.0, 10.0] {
            let (r, q) = rotation(Cayley::Exact, scale);
            close(r.clone().transpose().matmul(r.clone()), identity(), 2e-6);
            // R (I + Q) = I - Q, to the precision of the larger side.
            let product = r.matmul(identity() + q.clone());
            close(product, identity() - q, 1e-5 * (1.0 + 10.0 * scale));
        }
    }

    #[test]
    fn the_series_is_of_the_transposed_rotation() {
        let (exact, _) = rotation(Cayley::Exact, 0.01);
        for (terms, tolerance) in [(2, 2e-2), (4, 2e-3), (5, 1e-4), (9, 1e-6)] {
            let (r, _) = rotation(Cayley::Series(terms), 0.01);
            close(r, exact.clone().transpose(), tolerance);
        }
    }

    #[test]
    fn terms_are_added_up_as_in_peft() {
        let (_, q) = rotation(Cayley::Exact, 0.1);
        let power = |n: usize| (1..n).fold(q.clone(), |power, _| power.matmul(q.clone()));
        let two = identity() + power(1) * 2.0;
        let four = two.clone() + power(2) * 2.0 + power(3);
        let five = two.clone() + power(2) * 2.0 + power(3) * 2.0 + power(4);
        for (terms, want) in [(2, two), (3, four.clone()), (4, four), (5, five)] {
            let (got, _) = rotation(Cayley::Series(terms), 0.1);
            close(got, want, 1e-6);
        }
    }

    #[test]
    fn the_gradient_of_the_exact_map_is_that_of_differences() {
        let device = Device::flex().autodiff();
        let values = [0.3f32, -0.1, 0.2, 0.5, -0.4, 0.1];
        let weights: Vec<f32> = (0..16).map(|i| (i * 5 % 7) as f32 - 3.0).collect();
        let loss = |upper: Tensor<2>| {
            let rotations = Rotations::new(SIZE, Cayley::Exact, &Device::flex());
            let r: Tensor<2> = rotations.of(upper).reshape([SIZE, SIZE]);
            (r * tangent_ops::tensor(weights.clone(), SIZE, SIZE, &Device::flex())).sum()
        };
        let upper = tangent_ops::tensor(values.to_vec(), 1, 6, &device).require_grad();
        let gradients = loss(upper.clone()).backward();
        let gradient = tangent_ops::values(upper.grad(&gradients).unwrap());
        for (at, gradient) in gradient.iter().enumerate() {
            let moved = |by: f32| {
                let mut values = values;
                values[at] += by;
                let upper = tangent_ops::tensor(values.to_vec(), 1, 6, &Device::flex());
                tangent_ops::values(loss(upper))[0]
            };
            let difference = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!(
                (gradient - difference).abs() < 5e-3,
                "{gradient} {difference}"
            );
        }
    }
}
