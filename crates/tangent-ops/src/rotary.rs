//! Rotary position embedding in the rotate-half form (Su et al., 2104.09864).

use burn::tensor::{Device, Tensor};

use crate::kernel;

/// Cosines and sines of every position up to a limit, `(positions, head_dim / 2)` each.
#[derive(Clone, Debug)]
pub struct Rotary {
    half: usize,
    inverse_frequencies: Vec<f64>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotary {
    /// A table for `positions` positions from the inverse frequencies of each pair of features,
    /// `theta^(-2j / head_dim)` after any scaling of the model.
    pub fn new(inverse_frequencies: Vec<f64>, positions: usize) -> Self {
        // Angles are formed in f32 as the reference implementations do, so that positions agree.
        let angles = (0..positions).flat_map(|p| {
            let frequencies = inverse_frequencies.iter();
            frequencies.map(move |&f| f64::from(p as f32 * f as f32))
        });
        let (cos, sin) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        Self {
            half: inverse_frequencies.len(),
            inverse_frequencies,
            cos,
            sin,
        }
    }

    /// Inverse frequencies of the pairs of features, after any scaling of the model.
    pub fn inverse_frequencies(&self) -> &[f64] {
        &self.inverse_frequencies
    }

    /// Features of a head.
    pub(crate) fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Number of positions in the table.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// The same embedding with at least `positions` positions.
    pub fn extended(&self, positions: usize) -> Self {
        Self::new(self.inverse_frequencies.clone(), positions)
    }

    /// Cosines and sines of the feature pairs at `position`.
    pub(crate) fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let start = position as usize * self.half;
        (
            &self.cos[start..][..self.half],
            &self.sin[start..][..self.half],
        )
    }

    /// Rotates the heads of one token, `(heads, head_dim)`; `inverse` rotates back, which is the
    /// derivative.
    pub(crate) fn rotate_in_place(&self, heads: &mut [f32], position: u32, inverse: bool) {
        let sign = if inverse { -1.0 } else { 1.0 };
        let (cos, sin) = self.at(position);
        kernel::simd(
            #[inline(always)]
            || {
                for head in heads.chunks_exact_mut(2 * self.half) {
                    let (low, high) = head.split_at_mut(self.half);
                    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                        let (a, b, sin) = (*low, *high, sin * sign);
                        *low = a * cos - b * sin;
                        *high = b * cos + a * sin;
                    }
                }
            },
        );
    }

    /// Rotates every head of `x: (tokens, heads * head_dim)` in place.
    pub fn rotate(&self, x: &mut [f32], positions: &[u32]) {
        let width = x.len().checked_div(positions.len()).unwrap_or(1);
        assert!(
            x.len() == positions.len() * width && width.is_multiple_of(2 * self.half),
            "whole heads of every token"
        );
        for (token, &position) in x.chunks_exact_mut(width.max(1)).zip(positions) {
            self.rotate_in_place(token, position, false);
        }
    }
}

/// The definition in plain tensor operations, for one head: `x: (tokens, head_dim)`.
pub(crate) fn definition(
    x: Tensor<2>,
    positions: &[u32],
    rotary: &Rotary,
    device: &Device,
) -> Tensor<2> {
    let [n, d] = x.dims();
    let half = d / 2;
    let angles = positions.iter().map(|&p| rotary.at(p));
    let (cos, sin): (Vec<_>, Vec<_>) = angles.unzip();
    let table = |rows: Vec<&[f32]>| crate::tensor(rows.concat(), n, half, device);
    let (cos, sin) = (table(cos), table(sin));
    let low = x.clone().slice([0..n, 0..half]);
    let high = x.slice([0..n, half..d]);
    Tensor::cat(
        vec![
            low.clone() * cos.clone() - high.clone() * sin.clone(),
            high * cos + low * sin,
        ],
        1,
    )
}

/// Takes the rotary embedding at `positions` out of every head of `x: (tokens, heads * head_dim)`,
/// so that [`attention`](crate::attention()), which rotates all keys, leaves `x` as it is.
pub fn rotate_back(x: Tensor<2>, positions: &[u32], rotary: &Rotary) -> Tensor<2> {
    let ([n, width], d) = (x.dims(), rotary.head_dim());
    let device = x.device().without_autodiff();
    let head = |at: usize| {
        let head = x.clone().slice([0..n, at..at + d]);
        // The angle of opposite sign exchanges the halves before and after.
        definition(flipped(head), positions, rotary, &device)
    };
    let heads = (0..width).step_by(d).map(|at| flipped(head(at)));
    Tensor::cat(heads.collect(), 1)
}

/// The two halves of the columns, exchanged.
fn flipped(x: Tensor<2>) -> Tensor<2> {
    let [n, d] = x.dims();
    let half = |from: usize| x.clone().slice([0..n, from..from + d / 2]);
    Tensor::cat(vec![half(d / 2), half(0)], 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn rotation_is_inverted_and_keeps_relative_positions() {
        let rotary = Rotary::new(vec![1.0, 0.1, 0.01], 64);
        let x = check::values(12, 1);
        let mut there = x.clone();
        rotary.rotate(&mut there, &[5, 40]);
        assert!((there[0] - x[0]).abs() > 1e-3);
        for (token, position) in there.chunks_exact_mut(6).zip([5, 40]) {
            rotary.rotate_in_place(token, position, true);
        }
        check::close(&there, &x, 1e-6);
        // The product of two rotated vectors depends on the distance of their positions only.
        let product = |p: u32, q: u32| -> f32 {
            let (mut a, mut b) = (x[..6].to_vec(), x[6..].to_vec());
            rotary.rotate_in_place(&mut a, p, false);
            rotary.rotate_in_place(&mut b, q, false);
            a.iter().zip(&b).map(|(a, b)| a * b).sum()
        };
        assert!((product(3, 7) - product(43, 47)).abs() < 1e-5);
        assert!((product(3, 7) - product(3, 8)).abs() > 1e-4);
    }

    #[test]
    fn keys_are_rotated_back() {
        let (rotary, positions) = (Rotary::new(vec![1.0, 0.3], 400), [3, 70]);
        let x = check::values(16, 5);
        let mut rotated = x.clone();
        rotary.rotate(&mut rotated, &positions);
        let rotated = crate::tensor(rotated, 2, 8, &Device::flex());
        let back = rotate_back(rotated, &positions, &rotary);
        check::close(&crate::values(back), &x, 1e-6);
    }
}
