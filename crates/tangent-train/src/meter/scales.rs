//! Sites whose rows or columns are scaled: the projection of the gradient in closed form.
//!
//! ```text
//! W' = diag(l) W      T = { diag(x) W }      ||P_T G||^2 = sum_i <G_i, W_i>^2 / ||W_i||^2
//!
//! i: rows, or columns where W' = W diag(l)
//! ```

use tangent_ops::FrozenMatrix;

use super::basis::moved;
use super::known::{Directions, Read};

/// Rows or columns of a weight that are scaled.
pub(super) struct Scales<'a> {
    pub weight: &'a FrozenMatrix,
    pub of_inputs: bool,
    /// `l` before the step.
    pub vector: &'a [f32],
}

impl Scales<'_> {
    /// `<G_i, W_i>` and `||W_i||^2` of every row or column.
    fn products(&self, g: &[f32]) -> [Vec<f64>; 2] {
        let d_in = self.weight.cols();
        let mut of_g = vec![0.0; self.vector.len()];
        let mut of_w = of_g.clone();
        let mut rows = g.chunks_exact(d_in).enumerate();
        self.weight.for_each_rows(|values| {
            for (w, (i, g)) in values.chunks_exact(d_in).zip(&mut rows) {
                for (j, (g, w)) in g.iter().zip(w).enumerate() {
                    let at = if self.of_inputs { j } else { i };
                    let w = f64::from(*w);
                    of_g[at] += f64::from(*g) * w;
                    of_w[at] += w * w;
                }
            }
        });
        [of_g, of_w]
    }
}

impl Directions for Scales<'_> {
    fn read(&self, g: &[f32], after: &[Vec<f32>]) -> Option<Read> {
        let [after] = after else {
            return None;
        };
        let [of_g, of_w] = self.products(g);
        let moved = moved(after, self.vector).into_iter();
        let (mut captured, mut along, mut norm2) = (0.0, 0.0, 0.0);
        for ((moved, product), square) in moved.zip(of_g).zip(of_w) {
            if square > 0.0 {
                captured += product * product / square;
            }
            along += moved * product;
            norm2 += moved * moved * square;
        }
        Some(Read {
            captured,
            along,
            change_norm: norm2.sqrt(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::basis::tests::values;
    use super::super::known::tests::check;
    use super::*;

    #[test]
    fn captured_is_the_projection_on_scaled_rows_or_columns() {
        let shape = (6, 5);
        let weight = values(30, 1);
        for (of_inputs, count) in [(false, 6), (true, 5)] {
            let at = [values(count, 2)];
            let mut weight = weight.clone();
            // A row or column that cannot be moved.
            match of_inputs {
                false => weight[..5].fill(0.0),
                true => weight.iter_mut().step_by(5).for_each(|w| *w = 0.0),
            }
            let scaled = |l: &[Vec<f64>]| -> Vec<f64> {
                let at = |i: usize| l[0][if of_inputs { i % 5 } else { i / 5 }];
                let scaled = weight.iter().enumerate();
                scaled.map(|(i, w)| at(i) * f64::from(*w)).collect()
            };
            let frozen = FrozenMatrix::from_values(weight.clone(), 6, 5);
            let scales = Scales {
                weight: &frozen,
                of_inputs,
                vector: &at[0],
            };
            check(shape, &scales, &at, scaled);
        }
    }
}
