//! Register tiles: three tokens, or columns of three vectors, times the ranks that registers hold.

use std::{array, slice};

use pulp::{Simd, WithSimd};

use super::{LANES, Lanes, RANKS, Thin, Tile, pad, unpad};
use crate::kernel;

/// Tokens, or tiles side by side, that share each loaded number. With eight ranks they fill 32
/// registers; CPUs with fewer take four ranks at a time.
pub(super) const TOGETHER: usize = 3;

/// Tokens whose rows [`Outer`] reads side by side: few, so that the CPU prefetches along each row.
const BLOCK_TOKENS: usize = 16;

/// A kernel of tiles of `R` ranks.
pub(super) trait Kernel {
    fn run<S: Simd, const R: usize>(self, simd: S);
}

/// Runs a kernel by the widest vectors of this CPU.
pub(super) fn run(kernel: impl Kernel) {
    kernel::arch().dispatch(Run(kernel));
}

/// A kernel with as many ranks at a time as there are registers for.
pub(super) struct Run<K>(pub(super) K);

impl<K: Kernel> WithSimd for Run<K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT < 32 {
            self.0.run::<S, 4>(simd);
        } else {
            self.0.run::<S, RANKS>(simd);
        }
    }
}

/// [`super::dots`] of some tokens.
pub(super) struct Dots<'a> {
    pub(super) x: &'a [f32],
    pub(super) m: &'a Thin,
    pub(super) factor: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Dots<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(mut self, simd: S) {
        let (m, n) = (self.m, self.x.len() / self.m.d);
        for (tiles, k) in m.by_ranks().zip((0..).step_by(RANKS)) {
            let mut t = 0;
            while t + TOGETHER <= n {
                self.tokens::<S, TOGETHER, R>(simd, tiles, t, k);
                t += TOGETHER;
            }
            while t < n {
                self.tokens::<S, 1, R>(simd, tiles, t, k);
                t += 1;
            }
        }
    }
}

impl Dots<'_> {
    /// The results of tokens from `t` and ranks from `k`.
    #[inline(always)]
    fn tokens<S: Simd, const T: usize, const R: usize>(
        &mut self,
        simd: S,
        tiles: &[Tile],
        t: usize,
        k: usize,
    ) {
        let (x, d, rank) = (self.x, self.m.d, self.m.rank);
        let rows: [&[f32]; T] = array::from_fn(|i| &x[(t + i) * d..][..d]);
        let (whole, last) = tiles.split_at(d / LANES);
        let mut sums = [Tile::ZERO; T];
        let columns = rows.map(|row| row.as_chunks::<LANES>().0);
        add_dots::<S, T, R>(simd, columns, whole, &mut sums);
        if !last.is_empty() {
            let columns: [Lanes; T] = rows.map(|row| pad(row.as_chunks::<LANES>().1));
            let columns = columns.each_ref().map(slice::from_ref);
            add_dots::<S, T, R>(simd, columns, last, &mut sums);
        }
        let rows = self.out[t * rank..].chunks_exact_mut(rank);
        for (row, sums) in rows.zip(&sums) {
            for (out, lanes) in row[k..].iter_mut().zip(&sums.0) {
                *out = self.factor * kernel::sum(*lanes);
            }
        }
    }
}

/// Adds the products of `T` tokens and a row of tiles, lane by lane. A lane has the same columns
/// on every CPU, so that no vector width changes the sum.
#[inline(always)]
fn add_dots<S: Simd, const T: usize, const R: usize>(
    simd: S,
    x: [&[Lanes]; T],
    tiles: &[Tile],
    out: &mut [Tile; T],
) {
    // Equal lengths spare the loop its bounds checks.
    let x = x.map(|x| &x[..tiles.len()]);
    for part in 0..LANES / S::F32_LANES {
        for ranks in 0..RANKS / R {
            let mut sums = load::<S, T, R>(simd, out, ranks, part);
            for (i, tile) in tiles.iter().enumerate() {
                let mut columns = [simd.splat_f32s(0.0); T];
                for (columns, x) in columns.iter_mut().zip(&x) {
                    *columns = vector::<S>(&x[i], part);
                }
                for (k, m) in tile.0.as_chunks::<R>().0[ranks].iter().enumerate() {
                    let m = vector::<S>(m, part);
                    for (sums, x) in sums.iter_mut().zip(&columns) {
                        sums[k] = simd.mul_add_e_f32s(*x, m, sums[k]);
                    }
                }
            }
            store::<S, T, R>(&sums, out, ranks, part);
        }
    }
}

/// [`super::spread`] of some tokens, at least one.
pub(super) struct Spread<'a> {
    /// As from [`super::padded`].
    pub(super) h: &'a [[f32; RANKS]],
    pub(super) m: &'a Thin,
    pub(super) y: &'a mut [f32],
}

impl Kernel for Spread<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(mut self, simd: S) {
        let (h, m, n) = (self.h, self.m, self.y.len() / self.m.d);
        for (tiles, h) in m.by_ranks().zip(h.chunks_exact(n)) {
            let mut t = 0;
            while t + TOGETHER <= n {
                self.tokens::<S, TOGETHER, R>(simd, tiles, t, array::from_fn(|i| h[t + i]));
                t += TOGETHER;
            }
            while t < n {
                self.tokens::<S, 1, R>(simd, tiles, t, [h[t]]);
                t += 1;
            }
        }
    }
}

impl Spread<'_> {
    /// Adds eight ranks to the tokens from `t`.
    #[inline(always)]
    fn tokens<S: Simd, const T: usize, const R: usize>(
        &mut self,
        simd: S,
        tiles: &[Tile],
        t: usize,
        h: [[f32; RANKS]; T],
    ) {
        let d = self.m.d;
        let mut rows = self.y[t * d..].chunks_exact_mut(d);
        let mut rows: [&mut [f32]; T] = array::from_fn(|_| rows.next().expect("a row per token"));
        let (whole, last) = tiles.split_at(d / LANES);
        let columns = rows.each_mut().map(|row| row.as_chunks_mut::<LANES>().0);
        add_spread::<S, T, R>(simd, &h, whole, columns);
        if !last.is_empty() {
            let rest = rows.map(|row| row.as_chunks_mut::<LANES>().1);
            let mut columns: [Lanes; T] = rest.each_ref().map(|rest| pad(rest));
            let lone = columns.each_mut().map(slice::from_mut);
            add_spread::<S, T, R>(simd, &h, last, lone);
            for (columns, rest) in columns.iter().zip(rest) {
                unpad(columns, rest);
            }
        }
    }
}

/// Adds the products of eight ranks of `T` tokens and a row of tiles, rank after rank.
#[inline(always)]
fn add_spread<S: Simd, const T: usize, const R: usize>(
    simd: S,
    h: &[[f32; RANKS]; T],
    tiles: &[Tile],
    y: [&mut [Lanes]; T],
) {
    let mut y = y.map(|y| &mut y[..tiles.len()]);
    for ranks in 0..RANKS / R {
        let mut splats = [[simd.splat_f32s(0.0); R]; T];
        for (splats, h) in splats.iter_mut().zip(h) {
            for (splat, h) in splats.iter_mut().zip(&h.as_chunks::<R>().0[ranks]) {
                *splat = simd.splat_f32s(*h);
            }
        }
        for (i, tile) in tiles.iter().enumerate() {
            for part in 0..LANES / S::F32_LANES {
                let mut sums = [simd.splat_f32s(0.0); T];
                for (sum, y) in sums.iter_mut().zip(&y) {
                    *sum = vector::<S>(&y[i], part);
                }
                for (k, m) in tile.0.as_chunks::<R>().0[ranks].iter().enumerate() {
                    let m = vector::<S>(m, part);
                    for (sum, h) in sums.iter_mut().zip(&splats) {
                        *sum = simd.mul_add_e_f32s(h[k], m, *sum);
                    }
                }
                for (y, sum) in y.iter_mut().zip(&sums) {
                    *vector_mut::<S>(&mut y[i], part) = *sum;
                }
            }
        }
    }
}

/// [`super::outer`] of some columns.
pub(super) struct Outer<'a> {
    /// As from [`super::padded`].
    pub(super) h: &'a [[f32; RANKS]],
    pub(super) x: &'a [f32],
    pub(super) d: usize,
    /// The columns of `x` after its last sixteen, padded: `(n, 16)`, or nothing.
    pub(super) last: &'a [f32],
    /// Columns begin with this group of sixteen.
    pub(super) first: usize,
    pub(super) groups: usize,
    /// What to add to, `[ranks / 8][groups]`.
    pub(super) tiles: &'a mut [Tile],
}

impl Kernel for Outer<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(self, simd: S) {
        let (d, n) = (self.d, self.x.len() / self.d);
        let whole_groups = self.groups.min(d / LANES - self.first);
        let blocks = self.x.chunks(BLOCK_TOKENS * d);
        for (x, t) in blocks.zip((0..).step_by(BLOCK_TOKENS)) {
            let tiles = self.tiles.chunks_exact_mut(self.groups);
            for (h, tiles) in self.h.chunks_exact(n).zip(tiles) {
                let h = &h[t..t + x.len() / d];
                let (whole, last) = tiles.split_at_mut(whole_groups);
                let (several, single) = whole.as_chunks_mut::<TOGETHER>();
                let mut j = self.first * LANES;
                for tiles in several {
                    add_outer::<S, TOGETHER, R>(simd, h, (x, d), j, tiles);
                    j += TOGETHER * LANES;
                }
                for tile in single {
                    add_outer::<S, 1, R>(simd, h, (x, d), j, array::from_mut(tile));
                    j += LANES;
                }
                for tile in last {
                    let x = &self.last[t * LANES..];
                    add_outer::<S, 1, R>(simd, h, (x, LANES), 0, array::from_mut(tile));
                }
            }
        }
    }
}

/// Adds the products of eight ranks and the columns from `j` of some tokens, token after token.
#[inline(always)]
fn add_outer<S: Simd, const G: usize, const R: usize>(
    simd: S,
    h: &[[f32; RANKS]],
    (x, d): (&[f32], usize),
    j: usize,
    tiles: &mut [Tile; G],
) {
    for part in 0..LANES / S::F32_LANES {
        for ranks in 0..RANKS / R {
            let mut sums = load::<S, G, R>(simd, tiles, ranks, part);
            for (h, x) in h.iter().zip(x.chunks_exact(d)) {
                let mut columns = [simd.splat_f32s(0.0); G];
                let x = x[j..][..G * LANES].as_chunks::<LANES>().0;
                for (columns, x) in columns.iter_mut().zip(x) {
                    *columns = vector::<S>(x, part);
                }
                for (k, h) in h.as_chunks::<R>().0[ranks].iter().enumerate() {
                    let h = simd.splat_f32s(*h);
                    for (sums, x) in sums.iter_mut().zip(&columns) {
                        sums[k] = simd.mul_add_e_f32s(h, *x, sums[k]);
                    }
                }
            }
            store::<S, G, R>(&sums, tiles, ranks, part);
        }
    }
}

/// One of the vectors that make up sixteen lanes.
#[inline(always)]
fn vector<S: Simd>(lanes: &Lanes, part: usize) -> S::f32s {
    S::as_simd_f32s(lanes).0[part]
}

/// [`vector`], to be overwritten.
#[inline(always)]
fn vector_mut<S: Simd>(lanes: &mut Lanes, part: usize) -> &mut S::f32s {
    &mut S::as_mut_simd_f32s(lanes).0[part]
}

/// One vector of each of `R` ranks of each tile.
#[inline(always)]
fn load<S: Simd, const N: usize, const R: usize>(
    simd: S,
    tiles: &[Tile; N],
    ranks: usize,
    part: usize,
) -> [[S::f32s; R]; N] {
    let mut out = [[simd.splat_f32s(0.0); R]; N];
    for (out, tile) in out.iter_mut().zip(tiles) {
        for (out, lanes) in out.iter_mut().zip(&tile.0.as_chunks::<R>().0[ranks]) {
            *out = vector::<S>(lanes, part);
        }
    }
    out
}

/// The reverse of [`load`].
#[inline(always)]
fn store<S: Simd, const N: usize, const R: usize>(
    values: &[[S::f32s; R]; N],
    tiles: &mut [Tile; N],
    ranks: usize,
    part: usize,
) {
    for (values, tile) in values.iter().zip(tiles) {
        let lanes = &mut tile.0.as_chunks_mut::<R>().0[ranks];
        for (value, lanes) in values.iter().zip(lanes) {
            *vector_mut::<S>(lanes, part) = *value;
        }
    }
}
