//! Rotary position embedding in the rotate-half form (Su et al., 2104.09864).

use crate::kernel;

/// Cosines and sines of every position up to a limit: `(positions, head_dim / 2)`.
#[derive(Clone, Debug)]
pub struct Rotary {
    half: usize,
    inverse_frequencies: Vec<f64>,
    cos_sin: Vec<(f32, f32)>,
}

impl Rotary {
    /// A table for `positions` positions from the inverse frequencies of each pair of features,
    /// `theta^(-2j / head_dim)` after any scaling of the model.
    pub fn new(inverse_frequencies: Vec<f64>, positions: usize) -> Self {
        let half = inverse_frequencies.len();
        // Angles are formed in f32 as the reference implementations do, so that positions agree.
        let cos_sin = (0..positions)
            .flat_map(|p| {
                inverse_frequencies.iter().map(move |&f| {
                    let angle = p as f32 * f as f32;
                    (f64::from(angle).cos() as f32, f64::from(angle).sin() as f32)
                })
            })
            .collect();
        Self {
            half,
            inverse_frequencies,
            cos_sin,
        }
    }

    /// Number of positions in the table.
    pub fn positions(&self) -> usize {
        self.cos_sin.len() / self.half.max(1)
    }

    /// The same embedding with at least `positions` positions.
    pub fn extended(&self, positions: usize) -> Self {
        Self::new(self.inverse_frequencies.clone(), positions)
    }

    /// `(cos, sin)` of each feature pair at `position`.
    pub(crate) fn at(&self, position: u32) -> &[(f32, f32)] {
        &self.cos_sin[position as usize * self.half..][..self.half]
    }

    /// Rotates every head of `x: (tokens, heads * head_dim)`; `inverse` rotates back, which is
    /// the derivative.
    pub fn rotate(&self, x: &[f32], positions: &[u32], inverse: bool) -> Vec<f32> {
        let half = self.half;
        let width = x.len().checked_div(positions.len()).unwrap_or(1);
        let sign = if inverse { -1.0 } else { 1.0 };
        assert!(
            x.len() == positions.len() * width && width.is_multiple_of(2 * half),
            "whole heads of every token"
        );
        let mut out = kernel::buffer(x.len());
        kernel::fill_rows(&mut out, width, |token, out| {
            let table = self.at(positions[token]);
            let x = &x[token * width..][..width];
            for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                let (x_low, x_high) = x.split_at(half);
                let (low, high) = out.split_at_mut(half);
                for j in 0..half {
                    let (cos, sin) = (table[j].0, table[j].1 * sign);
                    low[j] = x_low[j] * cos - x_high[j] * sin;
                    high[j] = x_high[j] * cos + x_low[j] * sin;
                }
            }
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn rotation_is_inverted_and_keeps_relative_positions() {
        let rotary = Rotary::new(vec![1.0, 0.1, 0.01], 64);
        let x = check::values(12, 1);
        let there = rotary.rotate(&x, &[5, 40], false);
        check::close(&rotary.rotate(&there, &[5, 40], true), &x, 1e-6);
        // The product of two rotated vectors depends on the distance of their positions only.
        let product = |p: u32, q: u32| -> f32 {
            let (a, b) = (
                rotary.rotate(&x[..6], &[p], false),
                rotary.rotate(&x[6..], &[q], false),
            );
            a.iter().zip(&b).map(|(a, b)| a * b).sum()
        };
        assert!((product(3, 7) - product(43, 47)).abs() < 1e-5);
        assert!((product(3, 7) - product(3, 8)).abs() > 1e-4);
    }
}
