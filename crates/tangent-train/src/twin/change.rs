//! What a weight has changed by since the first step began, and how two changes of it compare.
//!
//! ```text
//! cosine       <D, F> / (||D|| ||F||)            D: the adapter's change      F: the twin's
//! best cosine  sqrt(sum_i<=r s_i^2 / ||F||^2)    s_i: singular values of F    r: rank of D
//! ```
//!
//! No matrix of rank r has a larger cosine with F than the best one, which F's own first r
//! directions have. It is known where the adapter is a product of two factors.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tangent_linalg::{LinalgError, MatRef, mat, svd, svd_lowrank};
use tangent_model::site::dense;
use tangent_model::{Pass, Site};
use tangent_peft::Factors;

/// Singular values that are told.
const SINGULAR_VALUES: usize = 16;
/// Directions beside those that are wanted, and iterations, of approximate decompositions. They
/// find singular values to a few digits.
const MORE: usize = 16;
const ITERATIONS: usize = 4;
/// Matrices with a side of so many times the directions at most are decomposed exactly.
const EXACT: usize = 4;

/// How the adapter's change of a matrix differs from the twin's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Path of the site.
    pub site: String,
    /// Rank that the adapter's change can have; `None` where it is no product of two factors.
    pub rank: Option<usize>,
    /// Frobenius norm of the adapter's change.
    pub adapter_norm: f64,
    /// Frobenius norm of the twin's.
    pub twin_norm: f64,
    /// Cosine between both; `None` where one of them is zero.
    pub cosine: Option<f64>,
    /// The largest cosine with the twin's change that a change of the adapter's rank can have.
    pub best_cosine: Option<f64>,
    /// The largest singular values of the adapter's change, at most 16.
    pub adapter_singular_values: Vec<f64>,
    /// Those of the twin's.
    pub twin_singular_values: Vec<f64>,
}

/// What an adapter added to a weight before the first step.
#[derive(Clone, Debug, PartialEq)]
pub struct Added {
    /// The factors of the product.
    pub factors: Factors,
    /// Scaling of the product.
    pub scaling: f32,
}

/// What a site's effective weight differs by from what it was before the first step, row-major. That
/// is the frozen weight, and what the adapter added to it by then; mostly nothing.
pub fn of(site: &Site, start: Option<&Added>, pass: &Pass) -> Vec<f32> {
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let Some(adapter) = site.attached() else {
        return vec![0.0; rows * cols];
    };
    let base = dense(&site.weight, pass);
    // Without the weight, beside which a small change would be rounded.
    let base = match adapter.is_additive() {
        true => base.zeros_like(),
        false => base,
    };
    let before = match start {
        None => base.clone(),
        Some(Added { factors, scaling }) => {
            let rank = factors.b.len() / rows.max(1);
            let a = tangent_ops::tensor(factors.a.clone(), rank, cols, &pass.device);
            let b = tangent_ops::tensor(factors.b.clone(), rows, rank, &pass.device);
            base.clone() + b.matmul(a) * *scaling
        }
    };
    tangent_ops::values(adapter.weight(base, pass) - before)
}

/// Compares two changes of a matrix `(d_out, d_in)`, of which the adapter's has at most this rank.
///
/// # Errors
/// If a value is not finite, or a decomposition does not converge.
pub fn compare(
    site: &str,
    shape: (usize, usize),
    rank: Option<usize>,
    adapter: &[f32],
    twin: &[f32],
) -> Result<Comparison, LinalgError> {
    let (adapter_norm, twin_norm) = (dot(adapter, adapter).sqrt(), dot(twin, twin).sqrt());
    let count = SINGULAR_VALUES.max(rank.unwrap_or(0));
    let own = singular_values(adapter, shape, SINGULAR_VALUES)?;
    let mut of_twin = singular_values(twin, shape, count)?;
    let best_cosine = rank.filter(|_| twin_norm > 0.0).map(|rank| {
        let kept: f64 = of_twin.iter().take(rank).map(|s| s * s).sum();
        digits((kept.sqrt() / twin_norm).min(1.0))
    });
    of_twin.truncate(SINGULAR_VALUES);
    let size = adapter_norm * twin_norm;
    Ok(Comparison {
        site: site.to_owned(),
        rank,
        adapter_norm: digits(adapter_norm),
        twin_norm: digits(twin_norm),
        cosine: (size > 0.0).then(|| digits((dot(adapter, twin) / size).clamp(-1.0, 1.0))),
        best_cosine,
        adapter_singular_values: own.into_iter().map(digits).collect(),
        twin_singular_values: of_twin.into_iter().map(digits).collect(),
    })
}

/// The largest singular values of a row-major matrix, descending.
fn singular_values(
    values: &[f32],
    (rows, cols): (usize, usize),
    count: usize,
) -> Result<Vec<f64>, LinalgError> {
    let directions = count + MORE;
    let mut found = if rows.min(cols) <= EXACT * directions {
        svd(mat(values, rows, cols).as_ref())?.s
    } else {
        let matrix = MatRef::from_row_major_slice(values, rows, cols);
        let mut random = ChaCha8Rng::seed_from_u64(0);
        svd_lowrank(matrix, directions, ITERATIONS, &mut random)?.s
    };
    found.truncate(count);
    Ok(found)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum()
}

/// A number to six digits: a record has thousands.
fn digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Close to six digits.
    #[track_caller]
    fn close(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len(), "{got:?}");
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() <= 1e-5 * want.abs().max(1e-3),
                "{got} {want}"
            );
        }
    }

    #[test]
    fn a_hand_made_case_has_the_known_numbers() {
        // F = diag(3, 2, 1) above a row of zeros; D has rank 1.
        let mut twin = vec![0.0; 12];
        for (i, s) in [3.0, 2.0, 1.0].into_iter().enumerate() {
            twin[i * 3 + i] = s;
        }
        let mut adapter = vec![0.0; 12];
        (adapter[0], adapter[1]) = (3.0, 4.0);
        let found = compare("q_proj", (4, 3), Some(1), &adapter, &twin).unwrap();
        assert_eq!((found.site.as_str(), found.rank), ("q_proj", Some(1)));
        let root = 14f64.sqrt();
        close(&[found.adapter_norm, found.twin_norm], &[5.0, root]);
        let cosines = [found.cosine.unwrap(), found.best_cosine.unwrap()];
        close(&cosines, &[9.0 / (5.0 * root), 3.0 / root]);
        close(&found.twin_singular_values, &[3.0, 2.0, 1.0]);
        close(&found.adapter_singular_values, &[5.0, 0.0, 0.0]);

        let nothing = compare("q_proj", (4, 3), None, &[0.0; 12], &twin).unwrap();
        assert_eq!((nothing.cosine, nothing.best_cosine), (None, None));
        let whole = compare("q_proj", (4, 3), Some(3), &twin, &twin).unwrap();
        close(
            &[whole.cosine.unwrap(), whole.best_cosine.unwrap()],
            &[1.0; 2],
        );
        assert!(compare("q_proj", (4, 3), None, &[f32::NAN; 12], &twin).is_err());
    }

    #[test]
    fn large_matrices_have_nearly_the_exact_values() {
        // Diagonal, so that the values are known, and larger than what is decomposed exactly.
        let side = EXACT * (SINGULAR_VALUES + MORE) + 9;
        let mut values = vec![0.0; side * (side + 3)];
        for i in 0..side {
            values[i * (side + 3) + i] = 1.0 / (i + 1) as f32;
        }
        let found = singular_values(&values, (side, side + 3), SINGULAR_VALUES).unwrap();
        for (i, got) in found.iter().enumerate() {
            let want = 1.0 / (i + 1) as f64;
            assert!((got - want).abs() < 1e-3 * want, "{i}: {got}");
        }
        assert_eq!(found.len(), SINGULAR_VALUES);
    }
}
