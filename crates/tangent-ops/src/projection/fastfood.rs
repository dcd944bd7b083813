//! Fastfood (Le et al., 1408.3060): a random matrix as a product of fast transforms, none of which
//! is kept.

use rayon::prelude::*;

use super::hadamard::transform;
use super::numbers::{Numbers, Order};
use super::{BLOCK, fill};
use crate::kernel;

/// Places that are computed together.
const PLACES: usize = 64;
/// Largest width at which sums over the places of a piece are held by a thread, and the least
/// numbers of a piece.
const FOLDED: usize = 1 << 16;
/// Most pieces.
const PIECES: usize = 64;

/// `y = H G O H (b * [x, 0])`, its first `values` numbers, times `factor`: H the Walsh-Hadamard
/// transform of `size` numbers, G normal, O an order, b signs.
#[derive(Clone, Debug)]
pub(super) struct Fastfood {
    inputs: usize,
    values: usize,
    size: usize,
    /// The least power of two that is no less than the inputs: as all after them is zero, the first
    /// transform repeats itself after so many numbers, and its adjoint begins with as many sums.
    width: usize,
    signs: Numbers,
    order: Order,
    normals: Numbers,
    /// `1 / sqrt(values sum G^2)`, with which x keeps its norm in the mean.
    factor: f32,
}

impl Fastfood {
    pub fn new(seed: u64, inputs: usize, values: usize) -> Self {
        let size = inputs.max(values).next_power_of_two();
        let normals = Numbers::new(seed, 2);
        let norm2 = values as f64 * squares(normals, size);
        Self {
            inputs,
            values,
            size,
            width: inputs.next_power_of_two(),
            signs: Numbers::new(seed, 0),
            order: Order::new(Numbers::new(seed, 1), size.trailing_zeros()),
            normals,
            factor: norm2.sqrt().recip() as f32,
        }
    }

    /// `P x`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut u = kernel::buffer(self.width);
        fill(
            &mut u,
            #[inline(always)]
            |first, out| {
                let given = copy_times(x, 1.0, first, out);
                for (i, out) in out.iter_mut().take(given).enumerate() {
                    *out *= self.signs.sign((first + i) as u32);
                }
            },
        );
        transform(&mut u);
        let mut y = kernel::buffer(self.size);
        fill(
            &mut y,
            #[inline(always)]
            |first, out| {
                self.normals.normals(first as u32, out);
                for (block, out) in out.chunks_mut(PLACES).enumerate() {
                    let places = self.places(first + block * PLACES);
                    for (out, place) in out.iter_mut().zip(places) {
                        *out *= u[place as usize];
                    }
                }
            },
        );
        drop(u);
        transform(&mut y);
        y.truncate(self.values);
        fill(
            &mut y,
            #[inline(always)]
            |_, out| out.iter_mut().for_each(|v| *v *= self.factor),
        );
        y
    }

    /// `P^T y`.
    pub fn adjoint(&self, y: &[f32]) -> Vec<f32> {
        let mut z = kernel::buffer(self.size);
        fill(
            &mut z,
            #[inline(always)]
            |first, out| {
                copy_times(y, self.factor, first, out);
            },
        );
        transform(&mut z);
        let mut u = match self.width <= FOLDED {
            true => self.folded(&mut z),
            false => self.gathered(&mut z),
        };
        drop(z);
        transform(&mut u);
        u.truncate(self.inputs);
        fill(
            &mut u,
            #[inline(always)]
            |first, out| {
                for (i, out) in out.iter_mut().enumerate() {
                    *out *= self.signs.sign((first + i) as u32);
                }
            },
        );
        u
    }

    /// Where the numbers from `first` on look in what repeats itself.
    #[inline(always)]
    fn places(&self, first: usize) -> [u32; PLACES] {
        let mask = self.width - 1;
        let mut places = [0; PLACES];
        for (i, place) in places.iter_mut().enumerate() {
            *place = (self.order.at((first + i) as u32) & mask) as u32;
        }
        places
    }

    /// Multiplies the numbers from `first` on by the normal ones.
    #[inline(always)]
    fn times_normals(&self, first: usize, values: &mut [f32]) {
        for (block, values) in values.chunks_mut(PLACES).enumerate() {
            let mut normals = [0.0; PLACES];
            let normals = &mut normals[..values.len()];
            self.normals
                .normals((first + block * PLACES) as u32, normals);
            for (value, normal) in values.iter_mut().zip(normals) {
                *value *= *normal;
            }
        }
    }

    /// The sums of `G z` over the numbers that look at the same place, in pieces that do not depend
    /// on threads; z is used up.
    fn folded(&self, z: &mut [f32]) -> Vec<f32> {
        let piece = FOLDED.max(self.size / PIECES);
        let pieces = z.par_chunks_mut(piece).enumerate().map(|(index, z)| {
            let mut sums = vec![0f64; self.width];
            kernel::simd(
                #[inline(always)]
                || {
                    for (block, z) in z.chunks_mut(PLACES).enumerate() {
                        let first = index * piece + block * PLACES;
                        self.times_normals(first, z);
                        for (z, place) in z.iter().zip(self.places(first)) {
                            sums[place as usize] += f64::from(*z);
                        }
                    }
                },
            );
            sums
        });
        let mut all = vec![0f64; self.width];
        for sums in pieces.collect::<Vec<_>>() {
            for (all, sum) in all.iter_mut().zip(sums) {
                *all += sum;
            }
        }
        all.into_iter().map(|sum| sum as f32).collect()
    }

    /// [`folded`](Self::folded) place by place, for many of them.
    fn gathered(&self, z: &mut [f32]) -> Vec<f32> {
        fill(
            z,
            #[inline(always)]
            |first, out| self.times_normals(first, out),
        );
        let z = &*z;
        let mut u = kernel::buffer(self.width);
        fill(
            &mut u,
            #[inline(always)]
            |first, out| {
                out.fill(0.0);
                for begin in (0..self.size).step_by(self.width) {
                    for (i, out) in out.iter_mut().enumerate() {
                        *out += z[self.order.back((begin + first + i) as u32)];
                    }
                }
            },
        );
        u
    }

    /// b, for every input.
    pub fn signs(&self) -> Vec<f32> {
        (0..self.inputs as u32)
            .map(|i| self.signs.sign(i))
            .collect()
    }

    /// G, and where each of its numbers looks: `(O u)_i = u[places[i]]`.
    pub fn normals_and_places(&self) -> (Vec<f32>, Vec<i32>) {
        let all = || 0..self.size as u32;
        let places = all().map(|i| self.order.at(i) as i32).collect();
        (all().map(|i| self.normals.normal(i)).collect(), places)
    }

    /// Numbers of a transform.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What all is multiplied by at the end.
    pub fn factor(&self) -> f32 {
        self.factor
    }
}

/// `factor * x` from `first` on, as many as there are, then zeros; how many came from x.
#[inline(always)]
fn copy_times(x: &[f32], factor: f32, first: usize, out: &mut [f32]) -> usize {
    let own = x.get(first..).unwrap_or_default();
    let given = own.len().min(out.len());
    let (head, tail) = out.split_at_mut(given);
    for (out, v) in head.iter_mut().zip(own) {
        *out = v * factor;
    }
    tail.fill(0.0);
    given
}

/// The sum of the squares of the first `size` normal numbers, piece by piece in their order.
fn squares(normals: Numbers, size: usize) -> f64 {
    let pieces: Vec<f64> = (0..size.div_ceil(BLOCK))
        .into_par_iter()
        .map(|piece| {
            let first = piece * BLOCK;
            let mut numbers = [0.0; BLOCK];
            let numbers = &mut numbers[..BLOCK.min(size - first)];
            kernel::simd(
                #[inline(always)]
                || normals.normals(first as u32, numbers),
            );
            let squares = numbers.iter().map(|v| f64::from(*v) * f64::from(*v));
            squares.sum::<f64>()
        })
        .collect();
    pieces.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn sums_by_piece_and_by_place_are_the_same() {
        for (inputs, values) in [(3, 40), (40, 3), (1000, 70_000), (1, 150_000)] {
            let fastfood = Fastfood::new(7, inputs, values);
            let mut z = check::values(fastfood.size, 3);
            let mut same = z.clone();
            let scale = (fastfood.size as f32 / fastfood.width as f32).sqrt();
            let found = fastfood.folded(&mut z);
            for (a, b) in found.iter().zip(fastfood.gathered(&mut same)) {
                assert!((a - b).abs() <= 1e-4 * scale, "{inputs} {values}: {a} {b}");
            }
        }
    }

    #[test]
    fn the_adjoint_of_many_inputs_is_the_transpose() {
        let (inputs, values) = (70_000, 200_000);
        let fastfood = Fastfood::new(7, inputs, values);
        assert!(fastfood.width > FOLDED && fastfood.width < fastfood.size);
        let (x, y) = (check::values(inputs, 1), check::values(values, 2));
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
            products.sum()
        };
        let (there, back) = (fastfood.apply(&x), fastfood.adjoint(&y));
        let (a, b) = (dot(&there, &y), dot(&x, &back));
        let scale = (dot(&there, &there) * dot(&y, &y)).sqrt();
        assert!((a - b).abs() <= 1e-5 * scale, "{a} {b}");
    }
}
