//! Directions of a site in closed form: the list of those that are known.

use tangent_model::{KroneckerFactor, Tangent};
use tangent_ops::FrozenMatrix;

use super::kronecker::{Factor, Kronecker, Side};
use super::monarch::Monarch;
use super::scales::Scales;
use super::triplets::Triplets;
use super::vectors::Vectors;

/// A gradient and a step, as the directions of a site have them.
pub(super) struct Read {
    /// `||P_T G||^2`.
    pub captured: f64,
    /// `<dW, G>`, to first order.
    pub along: f64,
    /// `||dW||`, to first order.
    pub change_norm: f64,
}

/// In which directions a site's weight moves with its parameters, at their values before the step.
pub(super) trait Directions {
    /// What they have of a row-major gradient and of a step to the values `after`, of which there are
    /// as many as before.
    fn read(&self, g: &[f32], after: &[Vec<f32>]) -> Option<Read>;
}

/// The directions at a frozen `weight` where parameters have the values `at`, in the order of
/// [`Tangent::parameters`].
pub(super) fn directions<'v>(
    tangent: &Tangent<'_>,
    weight: &'v FrozenMatrix,
    at: &'v [Vec<f32>],
) -> Option<Box<dyn Directions + 'v>> {
    let (d_out, d_in) = (weight.rows(), weight.cols());
    Some(match (tangent, at) {
        (Tangent::Triplets(triplets), [a, e, b]) => Box::new(Triplets {
            shape: (d_out, d_in),
            scaling: f64::from(triplets.scaling),
            a,
            e,
            b,
        }),
        (Tangent::Scales { of_inputs, .. }, [vector]) => Box::new(Scales {
            weight,
            of_inputs: *of_inputs,
            vector,
        }),
        (Tangent::Vectors { a, b, .. }, [inner, outer]) => {
            let rank = inner.len().max(1);
            let (all_a, mut b) = (a.values(), b.values());
            let rows = all_a.chunks_exact(all_a.len() / rank);
            b.truncate(d_out * rank);
            Box::new(Vectors {
                inner,
                outer,
                a: rows.flat_map(|row| &row[..d_in]).copied().collect(),
                b,
            })
        }
        (
            Tangent::Kronecker {
                first,
                second,
                scaling,
            },
            _,
        ) => {
            let (first, rest) = side(*first, at)?;
            let (second, _) = side(*second, rest)?;
            Box::new(Kronecker {
                first,
                second,
                scaling: f64::from(*scaling),
            })
        }
        (Tangent::Monarch { shape, .. }, [first, second]) => Box::new(Monarch {
            first,
            second,
            shape: *shape,
        }),
        _ => return None,
    })
}

/// A factor with the values that `at` begins with, and what `at` has left.
fn side<'v>(factor: KroneckerFactor<'_>, at: &'v [Vec<f32>]) -> Option<(Side<'v>, &'v [Vec<f32>])> {
    Some(match (factor, at) {
        (KroneckerFactor::Whole(matrix), [values, rest @ ..]) => {
            let [rows, cols] = matrix.shape() else {
                return None;
            };
            (Side::new((*rows, *cols), Factor::Whole(values)), rest)
        }
        (KroneckerFactor::Product(a, b), [of_a, of_b, rest @ ..]) => {
            let shape = (*a.shape().first()?, *b.shape().last()?);
            (Side::new(shape, Factor::Product(of_a, of_b)), rest)
        }
        _ => return None,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::basis::moved;
    use super::super::basis::tests::{explicit, values};
    use super::*;

    /// Holds directions to those of `weight`, a function of the parameters that is linear in each
    /// tensor of them, at the values `at`.
    pub(in super::super) fn check(
        (d_out, d_in): (usize, usize),
        directions: &dyn Directions,
        at: &[Vec<f32>],
        weight: impl Fn(&[Vec<f64>]) -> Vec<f64>,
    ) {
        let g = values(d_out * d_in, 11);
        let wide: Vec<Vec<f64>> = at
            .iter()
            .map(|values| values.iter().map(|v| f64::from(*v)).collect())
            .collect();
        // A change of one tensor in the place of its values.
        let along = |which: usize, by: Vec<f64>| {
            let mut moved = wide.clone();
            moved[which] = by;
            weight(&moved)
        };
        let mut all = vec![];
        for (which, values) in wide.iter().enumerate() {
            for index in 0..values.len() {
                let mut unit = vec![0.0; values.len()];
                unit[index] = 1.0;
                all.push(along(which, unit));
            }
        }
        let moves = at.iter().enumerate().map(|(which, values_at)| {
            let by = values(values_at.len(), 20 + which as u64);
            let after = values_at.iter().zip(by).map(|(v, by)| v + 0.5 * by);
            after.collect::<Vec<f32>>()
        });
        let after: Vec<Vec<f32>> = moves.collect();
        let mut change = vec![0.0; g.len()];
        for (which, (after, before)) in after.iter().zip(at).enumerate() {
            let part = along(which, moved(after, before));
            change.iter_mut().zip(part).for_each(|(sum, p)| *sum += p);
        }
        let read = directions.read(&g, &after).unwrap();
        let (got, want) = (read.captured, explicit(all, &g));
        let whole: f64 = g.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((got - want).abs() < 1e-5 * whole, "{got}, not {want}");
        let (inner, size) = (read.along, read.change_norm);
        let want = change
            .iter()
            .zip(&g)
            .map(|(c, g)| c * f64::from(*g))
            .sum::<f64>();
        let norm = change.iter().map(|c| c * c).sum::<f64>().sqrt();
        assert!((size - norm).abs() < 1e-5 * norm, "{size}, not {norm}");
        assert!(
            (inner - want).abs() < 1e-5 * norm * whole.sqrt(),
            "{inner}, not {want}"
        );
    }
}
