//! Products with thin matrices, whose rank is at most 64, in register tiles made for them.

mod tiles;

use rayon::prelude::*;

use self::tiles::{Dots, Outer, Spread, TOGETHER};
use crate::kernel;

/// Up to this rank these kernels are faster than the matrix product.
pub(crate) const MAX_RANK: usize = 64;

/// Neighboring columns: whole vectors on every CPU.
const LANES: usize = 16;
type Lanes = [f32; LANES];

/// Ranks of a tile.
const RANKS: usize = 8;

/// Tokens of one task: whole register tiles.
const TASK_TOKENS: usize = 48;

/// Tiles side by side in one task of [`outer`] at most, so that they stay in the first-level cache.
const TASK_TILES: usize = 24;

/// Up to this many multiplications take less time than waking a thread.
const ONE_THREAD: usize = 64 * 1024;

/// How a thin matrix `(rank, d)` lies in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Layout {
    /// Row-major.
    Rows,
    /// Transposed, as row-major `(d, rank)`.
    Columns,
}

/// Eight ranks of sixteen columns, aligned so that no vector lies in two cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Tile([Lanes; RANKS]);

impl Tile {
    const ZERO: Self = Self([[0.0; LANES]; RANKS]);

    /// Writes the part inside of a `(rank, d)` matrix, if the tile begins at rank `k`, column `j`.
    fn write(
        &self,
        out: &mut [f32],
        (rank, d): (usize, usize),
        layout: Layout,
        (k, j): (usize, usize),
    ) {
        match layout {
            Layout::Rows => {
                for (row, lanes) in out[k * d..].chunks_exact_mut(d).zip(&self.0) {
                    unpad(lanes, &mut row[j..]);
                }
            }
            Layout::Columns => {
                for (row, lane) in out[j * rank..].chunks_exact_mut(rank).zip(0..LANES) {
                    unpad(&self.0.each_ref().map(|lanes| lanes[lane]), &mut row[k..]);
                }
            }
        }
    }
}

/// A thin matrix `(rank, d)` in tiles, `[ranks / 8][columns / 16]`, filled up with zeros.
pub(crate) struct Thin {
    tiles: Vec<Tile>,
    rank: usize,
    d: usize,
}

impl Thin {
    /// Copies a `(rank, d)` matrix.
    ///
    /// # Panics
    /// If `rank` or `d` is zero.
    pub(crate) fn new(values: &[f32], rank: usize, d: usize, layout: Layout) -> Self {
        let groups = d.div_ceil(LANES);
        let mut tiles = vec![Tile::ZERO; rank.div_ceil(RANKS) * groups];
        match layout {
            Layout::Rows => {
                for (k, row) in values.chunks_exact(d).enumerate() {
                    let tiles = &mut tiles[k / RANKS * groups..];
                    for (tile, columns) in tiles.iter_mut().zip(row.chunks(LANES)) {
                        tile.0[k % RANKS] = pad(columns);
                    }
                }
            }
            Layout::Columns => {
                for (j, row) in values.chunks_exact(rank).enumerate() {
                    let tiles = tiles[j / LANES..].iter_mut().step_by(groups);
                    for (tile, k) in tiles.zip((0..).step_by(RANKS)) {
                        let column: [f32; RANKS] = pad(&row[k..]);
                        for (lanes, value) in tile.0.iter_mut().zip(&column) {
                            lanes[j % LANES] = *value;
                        }
                    }
                }
            }
        }
        Self { tiles, rank, d }
    }

    /// The tiles of eight ranks at a time.
    fn by_ranks(&self) -> impl Iterator<Item = &[Tile]> {
        self.tiles.chunks_exact(self.d.div_ceil(LANES))
    }
}

/// `out[t][k] = factor * sum_j x[t][j] * m[k][j]` for row-major `x: (n, d)` and `out: (n, rank)`.
/// A token's result depends neither on threads nor on other tokens.
pub(crate) fn dots(x: &[f32], m: &Thin, factor: f32) -> Vec<f32> {
    let n = x.len() / m.d;
    let mut out = kernel::buffer(n * m.rank);
    let task = |x: &[f32], out: &mut [f32]| {
        tiles::run(Dots { x, m, factor, out });
    };
    if n * m.rank * m.d <= ONE_THREAD {
        task(x, &mut out);
    } else {
        x.par_chunks(TASK_TOKENS * m.d)
            .zip(out.par_chunks_mut(TASK_TOKENS * m.rank))
            .for_each(|(x, out)| task(x, out));
    }
    out
}

/// `y[t][j] += factor * sum_k h[t][k] * m[k][j]` for row-major `h: (n, rank)` and `y: (n, d)`. A
/// token's result depends neither on threads nor on other tokens.
pub(crate) fn spread(h: &[f32], m: &Thin, factor: f32, y: &mut [f32]) {
    let task = |h: &[f32], y: &mut [f32]| {
        let h = &padded(h, m.rank, factor);
        tiles::run(Spread { h, m, y });
    };
    if h.len() * m.d > ONE_THREAD {
        h.par_chunks(TASK_TOKENS * m.rank)
            .zip(y.par_chunks_mut(TASK_TOKENS * m.d))
            .for_each(|(h, y)| task(h, y));
    } else if !h.is_empty() {
        task(h, y);
    }
}

/// `out[k][j] = factor * sum_t h[t][k] * x[t][j]` for row-major `h: (n, rank)` and `x: (n, d)`, as
/// a `(rank, d)` matrix in the given layout. Each element sums all tokens in their order, so that
/// no number of threads changes it.
///
/// # Panics
/// If `rank` or `d` is zero.
pub(crate) fn outer(
    (h, rank): (&[f32], usize),
    (x, d): (&[f32], usize),
    factor: f32,
    layout: Layout,
) -> Vec<f32> {
    let h = &padded(h, rank, factor);
    let last: Vec<Lanes> = match d % LANES {
        0 => vec![],
        rest => x.chunks_exact(d).map(|x| pad(&x[d - rest..])).collect(),
    };
    let (chunks, groups) = (rank.div_ceil(RANKS), d.div_ceil(LANES));
    let task = |first: usize, groups: usize| {
        let mut tiles = vec![Tile::ZERO; chunks * groups];
        tiles::run(Outer {
            h,
            x,
            d,
            last: last.as_flattened(),
            first,
            groups,
            tiles: &mut tiles,
        });
        tiles
    };
    let mut out = kernel::buffer(rank * d);
    let mut write = |tiles: &[Tile], first: usize| {
        let groups = tiles.len() / chunks;
        for (tiles, k) in tiles.chunks_exact(groups).zip((0..).step_by(RANKS)) {
            for (tile, group) in tiles.iter().zip(first..) {
                tile.write(&mut out, (rank, d), layout, (k, group * LANES));
            }
        }
    };
    if x.len() * rank <= ONE_THREAD {
        write(&task(0, groups), 0);
    } else {
        // Two tasks a thread even out threads of different speed.
        let share = groups.div_ceil(2 * rayon::current_num_threads());
        let per_task = share.next_multiple_of(TOGETHER).min(TASK_TILES);
        let tasks: Vec<(usize, Vec<Tile>)> = (0..groups.div_ceil(per_task))
            .into_par_iter()
            .map(|i| {
                let first = i * per_task;
                (first, task(first, per_task.min(groups - first)))
            })
            .collect();
        for (first, tiles) in &tasks {
            write(tiles, *first);
        }
    }
    out
}

/// The first `N` values, and zeros in place of missing ones.
#[inline(always)]
pub(crate) fn pad<const N: usize>(values: &[f32]) -> [f32; N] {
    values.first_chunk().copied().unwrap_or_else(|| {
        let mut padded = [0.0; N];
        padded[..values.len()].copy_from_slice(values);
        padded
    })
}

/// As many of the values as there is room for.
#[inline(always)]
pub(crate) fn unpad<const N: usize>(values: &[f32; N], out: &mut [f32]) {
    if let Some(out) = out.first_chunk_mut() {
        *out = *values;
    } else {
        out.copy_from_slice(&values[..out.len()]);
    }
}

/// `factor * h` for row-major `h: (n, rank)` as `[ranks / 8][token]`; missing ranks are zero.
fn padded(h: &[f32], rank: usize, factor: f32) -> Vec<[f32; RANKS]> {
    let mut out = Vec::with_capacity(rank.div_ceil(RANKS) * (h.len() / rank));
    for k in (0..rank).step_by(RANKS) {
        let rows = h.chunks_exact(rank).map(|row| pad::<RANKS>(&row[k..]));
        out.extend(rows.map(|row| row.map(|v| factor * v)));
    }
    out
}

#[cfg(test)]
mod tests {
    use pulp::{Simd, WithSimd};

    use super::*;
    use crate::check::{self, values};

    /// Asserts that each element is the sum of its terms.
    #[track_caller]
    fn sums<I: Iterator<Item = f64>>(got: &[f32], shape: [usize; 3], terms: impl Fn(usize) -> I) {
        for (i, got) in got.iter().enumerate() {
            let (want, size) = terms(i).fold((0.0, 0.0), |(sum, size), term: f64| {
                (sum + term, size + term.abs())
            });
            assert!(
                (f64::from(*got) - want).abs() <= 1e-5 * size,
                "[rank, columns, tokens] {shape:?}, element {i}: {got} for {want}"
            );
        }
    }

    fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        let elements = (0..cols).flat_map(|j| (0..rows).map(move |i| i * cols + j));
        elements.map(|at| values[at]).collect()
    }

    fn equal_loops(rank: usize, d: usize, n: usize) {
        let shape = [rank, d, n];
        let (x, h, m) = (values(n * d, 1), values(n * rank, 2), values(rank * d, 3));
        let (x, h, m) = (&x[..], &h[..], &m[..]);
        let factor = 1.7_f32;
        let product = move |a: f32, b: f32| f64::from(factor) * f64::from(a) * f64::from(b);
        let thin = Thin::new(m, rank, d, Layout::Rows);

        let projected = dots(x, &thin, factor);
        assert_eq!(projected.len(), n * rank);
        sums(&projected, shape, |i| {
            let (t, k) = (i / rank, i % rank);
            (0..d).map(move |j| product(x[t * d + j], m[k * d + j]))
        });
        let columns = Thin::new(&transposed(m, rank, d), rank, d, Layout::Columns);
        assert_eq!(dots(x, &columns, factor), projected, "{shape:?}");

        let before = values(n * d, 4);
        let (before, mut y) = (&before[..], before.clone());
        spread(h, &thin, factor, &mut y);
        sums(&y, shape, |i| {
            let (t, j) = (i / d, i % d);
            let added = (0..rank).map(move |k| product(h[t * rank + k], m[k * d + j]));
            added.chain([f64::from(before[i])])
        });

        let rows = outer((h, rank), (x, d), factor, Layout::Rows);
        assert_eq!(rows.len(), rank * d);
        sums(&rows, shape, |i| {
            let (k, j) = (i / d, i % d);
            (0..n).map(move |t| product(h[t * rank + k], x[t * d + j]))
        });
        let columns = outer((h, rank), (x, d), factor, Layout::Columns);
        assert_eq!(columns, transposed(&rows, rank, d), "{shape:?}");
    }

    #[test]
    fn products_equal_plain_loops() {
        for rank in [1, 3, 8, 11, 64] {
            for d in [1, 7, 16, 33, 576] {
                for n in [1, 5, 64, 130] {
                    equal_loops(rank, d, n);
                }
            }
        }
    }

    #[test]
    fn products_without_wide_vectors_equal_plain_loops() {
        for (rank, d, n) in [(1, 7, 1), (8, 33, 5), (11, 53, 64), (64, 16, 50)] {
            check::on_baseline(|| equal_loops(rank, d, n));
        }
    }

    #[test]
    fn no_tokens_give_nothing() {
        let thin = Thin::new(&values(2 * 3, 1), 2, 3, Layout::Rows);
        assert!(dots(&[], &thin, 1.0).is_empty());
        spread(&[], &thin, 1.0, &mut []);
        let gradient = outer((&[], 2), (&[], 3), 1.0, Layout::Columns);
        assert_eq!(gradient, vec![0.0; 6]);
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn threads_and_other_tokens_change_no_bit() {
        let (rank, d, n) = (11, 593, 130);
        assert!(rank * d * n > ONE_THREAD);
        let (x, h, m) = (values(n * d, 1), values(n * rank, 2), values(rank * d, 3));
        let thin = Thin::new(&m, rank, d, Layout::Rows);
        let run = |x: &[f32], h: &[f32]| {
            let mut y = x.to_vec();
            spread(h, &thin, 0.3, &mut y);
            [bits(&dots(x, &thin, 0.3)), bits(&y)]
        };
        let gradient = || bits(&outer((&h, rank), (&x, d), 0.3, Layout::Rows));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| (run(&x, &h), gradient()))
        };
        let (want, want_gradient) = on(1);
        assert_eq!(on(2), (want.clone(), want_gradient));
        for (t, (x, h)) in x.chunks(d).zip(h.chunks(rank)).enumerate() {
            let [dots, y] = run(x, h);
            assert_eq!(dots, want[0][t * rank..][..rank], "token {t}");
            assert_eq!(y, want[1][t * d..][..d], "token {t}");
        }
    }

    /// All three products by vectors of one kind, as bits.
    struct ByVectors;

    impl WithSimd for ByVectors {
        type Output = Vec<u32>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<u32> {
            let (rank, d, n) = (11, 53, 7);
            let (x, h, m) = (values(n * d, 1), values(n * rank, 2), values(rank * d, 3));
            let (x, h) = (&x[..], &padded(&h, rank, 0.3)[..]);
            let m = &Thin::new(&m, rank, d, Layout::Rows);
            let last: Vec<Lanes> = x.chunks(d).map(|x| pad(&x[48..])).collect();
            let mut out = vec![f32::NAN; n * rank];
            tiles::Run(Dots {
                x,
                m,
                factor: 0.3,
                out: &mut out,
            })
            .with_simd(simd);
            let mut y = x.to_vec();
            tiles::Run(Spread { h, m, y: &mut y }).with_simd(simd);
            let mut tiles = vec![Tile::ZERO; 2 * 4];
            tiles::Run(Outer {
                h,
                x,
                d,
                last: last.as_flattened(),
                first: 0,
                groups: 4,
                tiles: &mut tiles,
            })
            .with_simd(simd);
            let tiles = tiles.iter().flat_map(|tile| bits(tile.0.as_flattened()));
            let vectors = [bits(&out), bits(&y)];
            vectors.into_iter().flatten().chain(tiles).collect()
        }
    }

    #[test]
    fn vector_widths_change_no_bit() {
        let want = ByVectors.with_simd(pulp::Scalar128b);
        assert_eq!(ByVectors.with_simd(pulp::Scalar256b), want);
        assert_eq!(ByVectors.with_simd(pulp::Scalar512b), want);
        // The oldest CPUs round between multiplication and addition.
        if !matches!(pulp::Arch::new(), pulp::Arch::Scalar) {
            assert_eq!(pulp::Arch::new().dispatch(ByVectors), want);
        }
    }
}
