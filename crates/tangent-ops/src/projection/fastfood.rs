//! Fastfood (Le et al., 1408.3060): a random matrix as a product of fast transforms, none of which
//! is kept.

use rayon::prelude::*;

use super::hadamard::transform;
use super::numbers::{Numbers, Order};
use super::{BLOCK, fill};
use crate::kernel;

/// `y = H G O H (b * [x, 0])`, its first `values` numbers, times `factor`: H the Walsh-Hadamard
/// transform of `size` numbers, G normal, O an order, b signs.
#[derive(Clone, Debug)]
pub(super) struct Fastfood {
    inputs: usize,
    values: usize,
    size: usize,
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
            signs: Numbers::new(seed, 0),
            order: Order::new(Numbers::new(seed, 1), size.trailing_zeros()),
            normals,
            factor: norm2.sqrt().recip() as f32,
        }
    }

    /// `P x`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut u = kernel::buffer(self.size);
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
                for (i, out) in out.iter_mut().enumerate() {
                    *out = self.normals.normal((first + i) as u32);
                }
                for (i, out) in out.iter_mut().enumerate() {
                    *out *= u[self.order.at((first + i) as u32)];
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
        fill(
            &mut z,
            #[inline(always)]
            |first, out| {
                for (i, out) in out.iter_mut().enumerate() {
                    *out *= self.normals.normal((first + i) as u32);
                }
            },
        );
        let mut u = kernel::buffer(self.size);
        fill(
            &mut u,
            #[inline(always)]
            |first, out| {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = z[self.order.back((first + i) as u32)];
                }
            },
        );
        drop(z);
        transform(&mut u);
        u.truncate(self.inputs);
        for (i, u) in u.iter_mut().enumerate() {
            *u *= self.signs.sign(i as u32);
        }
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
                || {
                    for (i, out) in numbers.iter_mut().enumerate() {
                        *out = normals.normal((first + i) as u32);
                    }
                },
            );
            let squares = numbers.iter().map(|v| f64::from(*v) * f64::from(*v));
            squares.sum::<f64>()
        })
        .collect();
    pieces.iter().sum()
}
