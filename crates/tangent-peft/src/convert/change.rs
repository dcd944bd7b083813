//! What an adapter changes a weight by, and the thin factors that come closest to it.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use tangent_linalg::{LinalgError, Mat, MatRef, Svd, mat, product, qr, svd, svd_lowrank};
use tangent_model::{ModelError, Pass, Site, pass};
use tangent_ops::LowRank;

use crate::init::{Factors, residual_of};

/// Ranks up to which an exact form is looked for unasked.
const SMALL_RANK: usize = 64;
/// A singular value below this part of the largest is rounding.
const ZERO: f64 = 1e-5;
/// Sides up to which a matrix is decomposed exactly.
const EXACT_SIDE: usize = 128;
/// Directions of the randomized decomposition beyond those that are looked for.
const OVERSAMPLING: usize = 8;
/// Its power iterations.
const ITERATIONS: usize = 4;

/// The rank of a site's factors.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted {
    /// This one.
    Given(usize),
    /// That of the change where it is small, else this one, the adapter's own.
    Own(usize),
}

impl Wanted {
    /// The largest rank that factors of a `(rows, cols)` weight may have.
    fn limit(self, sides: (usize, usize)) -> usize {
        match self {
            Self::Given(rank) => rank,
            Self::Own(rank) => rank.max(small_rank(sides)),
        }
    }

    /// As many of the largest singular triplets of a change as are wanted.
    fn of(self, parts: Svd, sides: (usize, usize)) -> Svd {
        let rank = match self {
            Self::Given(rank) => rank,
            Self::Own(own) => match exact_rank(&parts.s) {
                exact if exact <= self.limit(sides) => exact,
                _ => own,
            },
        };
        parts.truncate(rank)
    }
}

/// Two thin factors `L: (d_out, k)` and `R: (d_in, k)` of a product `L R^T`.
#[derive(Clone)]
pub(super) struct Thin {
    pub(super) left: Mat<f64>,
    pub(super) right: Mat<f64>,
}

impl Thin {
    /// `s B A` without the directions that add nothing, such as triplets that AdaLoRA has masked.
    fn of(product: LowRank) -> Self {
        let LowRank { b, a, scaling } = product;
        let ([rows, rank], [_, cols]) = (b.dims(), a.dims());
        let (b, a) = (tangent_ops::values(b), tangent_ops::values(a));
        let adds = |k: &usize| {
            (0..rows).any(|i| b[i * rank + k] != 0.0)
                && a[k * cols..][..cols].iter().any(|v| *v != 0.0)
        };
        let kept: Vec<usize> = (0..rank).filter(adds).collect();
        let scaled = |v: f32| f64::from(scaling) * f64::from(v);
        Self {
            left: Mat::from_fn(rows, kept.len(), |i, j| scaled(b[i * rank + kept[j]])),
            right: Mat::from_fn(cols, kept.len(), |i, j| f64::from(a[kept[j] * cols + i])),
        }
    }

    /// Rows and columns of the product.
    fn sides(&self) -> (usize, usize) {
        (self.left.nrows(), self.right.nrows())
    }

    /// Factors of a product of zeros, `(rows, cols)`: of the rank that is given, else of rank 1.
    pub(super) fn zero((rows, cols): (usize, usize), wanted: Wanted) -> Self {
        let rank = match wanted {
            Wanted::Given(rank) => rank,
            Wanted::Own(_) => 1,
        };
        Self {
            left: Mat::zeros(rows, rank),
            right: Mat::zeros(cols, rank),
        }
    }

    /// `k`.
    pub(super) fn rank(&self) -> usize {
        self.left.ncols()
    }

    /// The difference of two products as one of more rank.
    fn minus(&self, other: &Self) -> Self {
        Self {
            left: beside(&self.left, &other.left.map(|v| -v)),
            right: beside(&self.right, &other.right),
        }
    }

    /// The squared norm of the product.
    fn energy(&self) -> f64 {
        if self.rank() == 0 {
            return 0.0;
        }
        let (_, left) = qr(self.left.as_ref());
        let (_, right) = qr(self.right.as_ref());
        let core = product(left.as_ref(), right.transpose());
        let columns = (0..core.ncols()).flat_map(|j| core.col_as_slice(j));
        columns.map(|v| v * v).sum()
    }

    /// The singular value decomposition of the product.
    fn decomposed(&self) -> Result<Svd, LinalgError> {
        let (left, left_core) = qr(self.left.as_ref());
        let (right, right_core) = qr(self.right.as_ref());
        let core = product(left_core.as_ref(), right_core.transpose());
        let Svd { u, s, v } = svd(core.as_ref())?;
        Ok(Svd {
            u: product(left.as_ref(), u.as_ref()),
            s,
            v: product(right.as_ref(), v.as_ref()),
        })
    }

    /// `U sqrt(S)` and `V sqrt(S)`.
    fn balanced(parts: &Svd) -> Self {
        let roots: Vec<f64> = parts.s.iter().map(|s| s.sqrt()).collect();
        let scaled = |m: &Mat<f64>| -> Mat<f64> {
            Mat::from_fn(m.nrows(), roots.len(), |i, j| m[(i, j)] * roots[j])
        };
        Self {
            left: scaled(&parts.u),
            right: scaled(&parts.v),
        }
    }

    /// The same product with columns of zeros up to `rank`.
    fn padded(self, rank: usize) -> Self {
        let more = rank.saturating_sub(self.rank());
        Self {
            left: beside(&self.left, &Mat::zeros(self.left.nrows(), more)),
            right: beside(&self.right, &Mat::zeros(self.right.nrows(), more)),
        }
    }

    /// As files hold it.
    fn rounded(&self) -> Self {
        let round = |m: &Mat<f64>| m.map(|v| f64::from(*v as f32));
        Self {
            left: round(&self.left),
            right: round(&self.right),
        }
    }
}

/// `[L, R]`, of as many rows each.
fn beside(left: &Mat<f64>, right: &Mat<f64>) -> Mat<f64> {
    let k = left.ncols();
    Mat::from_fn(left.nrows(), k + right.ncols(), |i, j| match j < k {
        true => left[(i, j)],
        false => right[(i, j - k)],
    })
}

/// `W' - W` of one site.
pub(super) enum Change {
    /// A product of two thin factors.
    Thin(Thin),
    /// Any matrix, row-major.
    Dense {
        values: Vec<f32>,
        rows: usize,
        cols: usize,
    },
}

impl Change {
    /// The change of a site's weight by whatever is attached to it.
    pub(super) fn of(site: &Site, pass: &Pass) -> Self {
        let (rows, cols) = (site.weight.rows(), site.weight.cols());
        let attached = site.attached();
        if let Some(product) = attached.as_ref().and_then(|adapter| adapter.low_rank(pass)) {
            return Self::Thin(Thin::of(product));
        }
        let values = match attached.filter(|adapter| adapter.is_additive()) {
            // Added to nothing, so that no digits are lost to the weight.
            Some(adapter) => {
                let nothing = vec![0.0; rows * cols];
                let nothing = tangent_ops::tensor(nothing, rows, cols, &pass.device);
                tangent_ops::values(adapter.weight(nothing, pass))
            }
            None => {
                let mut values = tangent_ops::values(site.effective_weight(pass));
                for (value, frozen) in values.iter_mut().zip(site.weight.to_values()) {
                    *value -= frozen;
                }
                values
            }
        };
        Self::Dense { values, rows, cols }
    }

    /// The change of a site's original weight where `taken` left that before it was quantized:
    /// what is attached does to the rest of the original weight, less what was taken.
    ///
    /// # Errors
    /// If the original weight cannot be read.
    pub(super) fn of_original(
        site: &Site,
        (taken, scaling): (&Factors, f32),
        pass: &Pass,
    ) -> Result<Self, ModelError> {
        let (rows, cols) = (site.weight.rows(), site.weight.cols());
        if let Some(product) = site.attached().and_then(|adapter| adapter.low_rank(pass)) {
            let rank = taken.b.len() / rows.max(1);
            let taken = Thin::of(LowRank {
                b: tangent_ops::tensor(taken.b.clone(), rows, rank, &pass.device),
                a: tangent_ops::tensor(taken.a.clone(), rank, cols, &pass.device),
                scaling,
            });
            return Ok(Self::Thin(Thin::of(product).minus(&taken)));
        }
        let residual = match &site.original {
            Some(original) => original()?,
            None => site.weight.clone(),
        };
        let mut values = tangent_ops::values(site.effective_weight_on(&residual, pass));
        for (value, frozen) in values.iter_mut().zip(residual.to_values()) {
            *value -= frozen;
        }
        let values = residual_of(&values, (rows, cols), taken, scaling).to_values();
        Ok(Self::Dense { values, rows, cols })
    }

    /// The squared Frobenius norm; not finite if an element is not.
    pub(super) fn energy(&self) -> f64 {
        match self {
            Self::Thin(thin) => thin.energy(),
            Self::Dense { values, .. } => {
                let squares = values.iter().map(|v| f64::from(*v) * f64::from(*v));
                squares.sum()
            }
        }
    }

    /// The closest factors of the wanted rank, rounded as files hold them. Random numbers depend on
    /// `path` only.
    ///
    /// # Errors
    /// If a decomposition does not converge.
    pub(super) fn closest(&self, wanted: Wanted, path: &str) -> Result<Thin, LinalgError> {
        let thin = match self {
            Self::Thin(thin) if thin.rank() <= wanted.limit(thin.sides()) => thin.clone(),
            Self::Thin(thin) => Thin::balanced(&wanted.of(thin.decomposed()?, thin.sides())),
            Self::Dense { values, rows, cols } => {
                let sides = (*rows, *cols);
                let parts = largest(values, sides, wanted.limit(sides), path)?;
                Thin::balanced(&wanted.of(parts, sides))
            }
        };
        let thin = match wanted {
            Wanted::Given(rank) => thin.padded(rank),
            Wanted::Own(_) => thin,
        };
        Ok(thin.rounded())
    }

    /// The squared norm of what is left without the product of `factors`.
    pub(super) fn distance(&self, factors: &Thin) -> f64 {
        match self {
            Self::Thin(thin) => thin.minus(factors).energy(),
            Self::Dense { values, cols, .. } => residual(values, *cols, factors),
        }
    }
}

/// The largest rank whose factors have at most half the numbers of a dense matrix, or
/// [`SMALL_RANK`] if that is less.
fn small_rank((rows, cols): (usize, usize)) -> usize {
    SMALL_RANK.min(rows * cols / (2 * (rows + cols)))
}

/// The number of singular values, in descending order, that are not rounding.
fn exact_rank(values: &[f64]) -> usize {
    let zero = ZERO * values.first().copied().unwrap_or(0.0);
    values.partition_point(|value| *value > zero)
}

/// More than `rank` singular triplets, the largest ones, or all: nearly exact ones by a sketch,
/// exact ones of a small matrix and where a sketch would be half as wide as the matrix.
fn largest(
    values: &[f32],
    (rows, cols): (usize, usize),
    rank: usize,
    path: &str,
) -> Result<Svd, LinalgError> {
    let width = rank + OVERSAMPLING;
    let side = rows.min(cols);
    if side <= EXACT_SIDE || 2 * width >= side {
        return svd(mat(values, rows, cols).as_ref());
    }
    let view = MatRef::from_row_major_slice(values, rows, cols);
    let mut rng = ChaCha8Rng::seed_from_u64(pass::mix(0, path));
    svd_lowrank(view, width, ITERATIONS, &mut rng)
}

/// `|D - L R^T|^2` of row-major values with `cols` columns.
fn residual(values: &[f32], cols: usize, factors: &Thin) -> f64 {
    let Thin { left, right } = factors;
    let rank = factors.rank();
    let columns: Vec<&[f64]> = (0..rank).map(|k| right.col_as_slice(k)).collect();
    let of_row = |(i, row): (usize, &[f32])| -> f64 {
        let mut rest: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
        for (k, column) in columns.iter().enumerate() {
            let scale = left[(i, k)];
            for (rest, value) in rest.iter_mut().zip(*column) {
                *rest -= scale * value;
            }
        }
        rest.iter().map(|v| v * v).sum()
    };
    // Added up in the order of rows, whatever the number of threads.
    let rows: Vec<f64> = values
        .par_chunks(cols.max(1))
        .enumerate()
        .map(of_row)
        .collect();
    rows.iter().sum()
}

#[cfg(test)]
mod tests {
    use rand::RngExt;
    use tangent_linalg::to_rows;

    use super::*;

    /// Numbers in -1 to 1.
    fn numbers(rows: usize, cols: usize, seed: u64) -> Mat<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Mat::from_fn(rows, cols, |_, _| 2.0 * rng.random::<f64>() - 1.0)
    }

    fn thin(rows: usize, cols: usize, rank: usize) -> Thin {
        Thin {
            left: numbers(rows, rank, 1),
            right: numbers(cols, rank, 2),
        }
    }

    fn multiplied(thin: &Thin) -> Mat<f64> {
        product(thin.left.as_ref(), thin.right.transpose())
    }

    fn dense(m: &Mat<f64>) -> Change {
        Change::Dense {
            values: to_rows(m.as_ref()),
            rows: m.nrows(),
            cols: m.ncols(),
        }
    }

    #[track_caller]
    fn close(got: f64, want: f64, tolerance: f64) {
        assert!((got - want).abs() <= tolerance, "{got} against {want}");
    }

    #[test]
    fn a_product_and_its_dense_form_are_measured_and_truncated_alike() {
        for (rows, cols) in [(9, 14), (14, 9), (150, 140)] {
            let factors = thin(rows, cols, 5);
            let whole = dense(&multiplied(&factors));
            let values = factors.decomposed().unwrap().s;
            let tail: f64 = values[2..].iter().map(|s| s * s).sum();
            let energy = whole.energy();
            let product = Change::Thin(factors);
            close(product.energy(), energy, 1e-6 * energy);
            for change in [&product, &whole] {
                let closest = change.closest(Wanted::Given(2), "q_proj").unwrap();
                assert_eq!(closest.rank(), 2);
                for measure in [&product, &whole] {
                    close(measure.distance(&closest), tail, 1e-5 * energy);
                }
                // Balanced: both factors have the same norms, column by column.
                for k in 0..2 {
                    let norm =
                        |m: &Mat<f64>| -> f64 { m.col_as_slice(k).iter().map(|v| v * v).sum() };
                    close(norm(&closest.left), values[k], 1e-2 * values[0]);
                    close(norm(&closest.right), values[k], 1e-2 * values[0]);
                }
            }
        }
    }

    #[test]
    fn the_exact_rank_is_taken_where_it_is_small_and_the_given_one_always() {
        // Half the numbers of 150 x 140 are those of rank 36, found by a sketch.
        for (sides, small) in [((150, 140), 36), ((9, 14), 2), ((4096, 4096), 64)] {
            assert_eq!(small_rank(sides), small);
        }
        let own = |change: &Change| change.closest(Wanted::Own(3), "q_proj").unwrap();
        let few = dense(&multiplied(&thin(150, 140, 12)));
        let exact = own(&few);
        assert_eq!(exact.rank(), 12);
        assert!(few.distance(&exact) < 1e-9 * few.energy());
        let many = dense(&multiplied(&thin(150, 140, 50)));
        assert_eq!(own(&many).rank(), 3);
        let given = few.closest(Wanted::Given(20), "q_proj").unwrap();
        assert_eq!(given.rank(), 20);
    }

    #[test]
    fn a_product_of_less_rank_stays_and_is_padded() {
        let factors = thin(8, 6, 2).rounded();
        let change = Change::Thin(factors.clone());
        let own = change.closest(Wanted::Own(4), "q_proj").unwrap();
        assert_eq!(to_rows(own.left.as_ref()), to_rows(factors.left.as_ref()));
        let given = change.closest(Wanted::Given(4), "q_proj").unwrap();
        assert_eq!((given.left.ncols(), given.right.ncols()), (4, 4));
        assert!(change.distance(&given) < 1e-20);
        let zero = Thin::zero((8, 6), Wanted::Own(4));
        assert_eq!((zero.rank(), zero.energy()), (1, 0.0));
        close(change.distance(&zero), change.energy(), 1e-9);
    }

    #[test]
    fn numbers_that_are_not_finite_show_in_the_energy() {
        let mut factors = thin(8, 6, 2);
        factors.left[(3, 1)] = f64::NAN;
        assert!(!Change::Thin(factors.clone()).energy().is_finite());
        assert!(!dense(&multiplied(&factors)).energy().is_finite());
    }
}
