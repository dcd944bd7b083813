//! Sites whose rows or columns are scaled: the projection of the gradient in closed form.
//!
//! ```text
//! W' = diag(l) W      T = { diag(x) W }      ||P_T G||^2 = sum_i <G_i, W_i>^2 / ||W_i||^2
//!
//! i: rows, or columns where W' = W diag(l)
//! ```

use super::known::{Directions, Read};

/// Rows or columns of a weight that are scaled.
pub(super) struct Scales<'a> {
    /// Row-major.
    weight: Vec<f32>,
    d_in: usize,
    of_inputs: bool,
    /// `l` before the step.
    vector: &'a [f32],
}

impl<'a> Scales<'a> {
    /// Of a row-major weight with `d_in` columns.
    pub fn new(weight: Vec<f32>, d_in: usize, of_inputs: bool, vector: &'a [f32]) -> Self {
        Self {
            weight,
            d_in,
            of_inputs,
            vector,
        }
    }

    /// `<X_i, W_i>` of every row or column.
    fn products(&self, x: &[f32]) -> Vec<f64> {
        let mut sums = vec![0.0; self.vector.len()];
        let rows = x
            .chunks_exact(self.d_in)
            .zip(self.weight.chunks_exact(self.d_in));
        for (i, (x, w)) in rows.enumerate() {
            let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            match self.of_inputs {
                true => sums.iter_mut().zip(products).for_each(|(sum, p)| *sum += p),
                false => sums[i] = products.sum(),
            }
        }
        sums
    }
}

impl Directions for Scales<'_> {
    fn read(&self, g: &[f32], after: &[Vec<f32>]) -> Option<Read> {
        let [after] = after else {
            return None;
        };
        let (of_g, of_w) = (self.products(g), self.products(&self.weight));
        let moved = after.iter().zip(self.vector);
        let moved = moved.map(|(after, before)| f64::from(*after) - f64::from(*before));
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
            let scales = Scales::new(weight.clone(), 5, of_inputs, &at[0]);
            check(shape, &scales, &at, scaled);
        }
    }
}
