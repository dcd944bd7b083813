//! Linear maps of one normalized input, each perhaps with a low-rank part:
//! `y_i = n W_i^T + s_i (n A_i^T) B_i^T` with `n = rms_norm(x)`.
//!
//! All `A_i` go through `n` together if the sum of their ranks is one for the thin kernels, the
//! gradients of `n` add up where they are formed, and `n` is not kept for the backward pass but
//! formed again from `x`.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::custom::{self, Matrix};
use crate::frozen_linear::{self, frozen_linear};
use crate::kernel::{self, Into};
use crate::low_rank::{self, Factor, LowRank, outer};
use crate::matrix::FrozenMatrix;
use crate::rms_norm::{self, RmsNorm};
use crate::several::{self, SeveralOp};
use crate::tap::{Tap, tap};
use crate::thin::Layout;

/// One of the maps.
pub struct NormedLinear<'a> {
    /// `(d_out, d)`.
    pub weight: &'a FrozenMatrix,
    /// What is added to it.
    pub product: Option<LowRank>,
    /// Who is told of the map, as by [`tap`], and by which name.
    pub tap: Option<(Arc<dyn Tap>, &'a str)>,
}

/// The `maps` of `rms_norm(x)` with the frozen scale `norm: (1, d)`, for `x: (tokens, d)`.
///
/// There may be one to three of them.
pub fn normed_linears<const N: usize>(
    x: Tensor<2>,
    norm: &FrozenMatrix,
    eps: f32,
    maps: [NormedLinear<'_>; N],
) -> [Tensor<2>; N] {
    const { assert!(matches!(N, 1..=3), "no operation has as many factors") };
    if !custom::has_kernels(&x) {
        return definition(x, norm, eps, maps);
    }
    let mut inputs = vec![x];
    let maps = maps.map(|map| {
        let scaling = map.product.map(|LowRank { a, b, scaling }| {
            inputs.extend([a, b]);
            scaling
        });
        Map {
            weight: map.weight.clone(),
            scaling,
            tap: map.tap.map(|(sink, name)| (sink, name.to_owned())),
        }
    });
    let op = NormedLinears {
        norm: RmsNorm { eps },
        scale: Matrix::new(norm.to_values(), 1, norm.cols()),
        maps,
    };
    several::apply(op, inputs)
}

/// The definition, by an operation for each part, which has a definition itself.
pub fn definition<const N: usize>(
    x: Tensor<2>,
    norm: &FrozenMatrix,
    eps: f32,
    maps: [NormedLinear<'_>; N],
) -> [Tensor<2>; N] {
    let n = rms_norm::rms_norm(x.clone(), norm.dense(&x.device()), eps);
    maps.map(|map| {
        let y = match map.product {
            Some(LowRank { a, b, scaling }) => {
                low_rank::low_rank_linear(n.clone(), map.weight, a, b, scaling)
            }
            None => frozen_linear(n.clone(), map.weight),
        };
        match map.tap {
            Some((sink, name)) => tap(n.clone(), y, sink, name),
            None => y,
        }
    })
}

#[derive(Debug)]
struct Map {
    weight: FrozenMatrix,
    /// That of the low-rank part, whose factors are inputs.
    scaling: Option<f32>,
    tap: Option<(Arc<dyn Tap>, String)>,
}

/// Inputs: x, then a and b of every map that has them.
#[derive(Debug)]
struct NormedLinears<const N: usize> {
    norm: RmsNorm,
    scale: Matrix,
    maps: [Map; N],
}

/// The low-rank part of one map.
struct Part<'a> {
    map: usize,
    a: &'a Matrix,
    b: &'a Matrix,
    scaling: f32,
}

impl<const N: usize> NormedLinears<N> {
    /// The low-rank parts, from their factors.
    fn parts<'a>(&self, factors: &'a [Matrix]) -> Vec<Part<'a>> {
        let maps = self.maps.iter().enumerate();
        let scaled = maps.filter_map(|(index, map)| Some((index, map.scaling?)));
        let parts = scaled.zip(factors.chunks_exact(2));
        let part = |((map, scaling), pair): ((usize, f32), &'a [Matrix])| Part {
            map,
            a: &pair[0],
            b: &pair[1],
            scaling,
        };
        parts.map(part).collect()
    }
}

/// All `a`, which go through what they are multiplied with together if their ranks allow it.
struct Downs<'a> {
    each: Vec<&'a Matrix>,
    /// `(all ranks, d)`.
    stacked: Option<Matrix>,
}

impl<'a> Downs<'a> {
    fn new(parts: &[Part<'a>], tokens: usize) -> Self {
        let each: Vec<&Matrix> = parts.iter().map(|part| part.a).collect();
        let rank = each.iter().map(|a| a.rows()).sum();
        let d = each.first().map_or(0, |a| a.cols());
        let together = each.len() > 1 && low_rank::is_thin(tokens, rank, d);
        let stacked = together.then(|| {
            let mut values = Vec::with_capacity(rank * d);
            for a in &each {
                values.extend_from_slice(a.values());
            }
            Matrix::new(values, rank, d)
        });
        Self { each, stacked }
    }

    /// `x A_i^T` for `x: (tokens, d)`.
    fn dots(&self, x: &Matrix) -> Vec<Matrix> {
        let dots = |a: &Matrix| Factor::new(a, Layout::Rows, x.rows()).dots(x, 1.0);
        let Some(stacked) = &self.stacked else {
            return self.each.iter().map(|a| dots(a)).collect();
        };
        let all = dots(stacked);
        let mut first = 0;
        let parts = self.each.iter().map(|a| {
            let mut values = Vec::with_capacity(x.rows() * a.rows());
            for row in all.values().chunks_exact(all.cols()) {
                values.extend_from_slice(&row[first..first + a.rows()]);
            }
            first += a.rows();
            Matrix::new(values, x.rows(), a.rows())
        });
        parts.collect()
    }

    /// `h_i` side by side, if that is how they go through.
    fn joined(&self, h: &[Matrix], tokens: usize) -> Option<Matrix> {
        let rank = self.stacked.as_ref()?.rows();
        let mut values = Vec::with_capacity(tokens * rank);
        for token in 0..tokens {
            for h in h {
                values.extend_from_slice(&h.values()[token * h.cols()..][..h.cols()]);
            }
        }
        Some(Matrix::new(values, tokens, rank))
    }

    /// `x += sum_i h_i A_i`.
    fn spread(&self, h: &[Matrix], tokens: usize, x: &mut [f32]) {
        if let (Some(a), Some(h)) = (&self.stacked, self.joined(h, tokens)) {
            Factor::new(a, Layout::Rows, tokens).spread(&h, 1.0, x);
            return;
        }
        for (a, h) in self.each.iter().zip(h) {
            Factor::new(a, Layout::Rows, tokens).spread(h, 1.0, x);
        }
    }

    /// `h_i^T x`, the gradients of all `a`.
    fn outer(&self, h: &[Matrix], x: &Matrix) -> Vec<Matrix> {
        let Some(joined) = self.joined(h, x.rows()) else {
            return h.iter().map(|h| outer(h, x, 1.0, Layout::Rows)).collect();
        };
        let all = outer(&joined, x, 1.0, Layout::Rows);
        let mut rest = all.values();
        let parts = self.each.iter().map(|a| {
            let (own, others) = rest.split_at(a.rows() * x.cols());
            rest = others;
            Matrix::new(own.to_vec(), a.rows(), x.cols())
        });
        parts.collect()
    }
}

impl<const N: usize> SeveralOp<N> for NormedLinears<N> {
    fn name(&self) -> &'static str {
        "normed_linears"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> ([Matrix; N], Vec<Matrix>) {
        let (x, factors) = (&inputs[0], &inputs[1..]);
        let tokens = x.rows();
        let parts = self.parts(factors);
        let normed = self.norm.normalized(x, &self.scale);
        let h = Downs::new(&parts, tokens).dots(&normed);
        let outputs = std::array::from_fn(|index| {
            let map = &self.maps[index];
            if let Some((sink, name)) = &map.tap
                && sink.wants_inputs()
            {
                sink.input(name, normed.values(), tokens);
            }
            let mut y = frozen_linear::forward(normed.values(), tokens, &map.weight);
            if let Some((part, h)) = parts.iter().zip(&h).find(|(part, _)| part.map == index) {
                Factor::new(part.b, Layout::Columns, tokens).spread(h, part.scaling, &mut y);
            }
            Matrix::new(y, tokens, map.weight.rows())
        });
        let saved = match tracked {
            true => inputs.iter().cloned().chain(h).collect(),
            false => vec![],
        };
        (outputs, saved)
    }

    fn backward(
        &self,
        saved: Vec<Matrix>,
        d_outputs: [Option<Matrix>; N],
        needed: &[bool],
    ) -> Vec<Option<Matrix>> {
        let (x, rest) = (&saved[0], &saved[1..]);
        let (factors, h) = rest.split_at(needed.len() - 1);
        let parts = self.parts(factors);
        let (tokens, d) = (x.rows(), x.cols());
        let x_needed = needed[0];
        let [a_needed, b_needed] = [1, 2]
            .map(|first| -> Vec<bool> { needed.iter().skip(first).step_by(2).copied().collect() });
        let any_a = a_needed.contains(&true);

        let tapped = self.maps.iter().any(|map| map.tap.is_some());
        let normed = (any_a || tapped).then(|| self.norm.normalized(x, &self.scale));
        for (map, dy) in self.maps.iter().zip(&d_outputs) {
            if let (Some((sink, name)), Some(dy), Some(normed)) = (&map.tap, dy, &normed) {
                sink.linear(name, normed.values(), dy.values(), tokens);
            }
        }

        // An output that nothing depends on passes zeros on.
        let d_h = |part: &Part<'_>| match &d_outputs[part.map] {
            Some(dy) => Factor::new(part.b, Layout::Columns, tokens).dots(dy, part.scaling),
            None => zeros(tokens, part.a.rows()),
        };
        let d_h: Vec<Matrix> = match x_needed || any_a {
            true => parts.iter().map(d_h).collect(),
            false => vec![],
        };
        let d_b = |(part, h): (&Part<'_>, &Matrix)| match &d_outputs[part.map] {
            Some(dy) => outer(h, dy, part.scaling, Layout::Columns),
            None => zeros(part.b.rows(), part.b.cols()),
        };
        let d_b: Vec<Option<Matrix>> = b_needed
            .iter()
            .zip(parts.iter().zip(h))
            .map(|(needed, part)| needed.then(|| d_b(part)))
            .collect();
        let downs = Downs::new(&parts, tokens);
        let d_a = match normed.filter(|_| any_a) {
            Some(normed) => downs.outer(&d_h, &normed),
            None => vec![],
        };
        let mut gradients = vec![x_needed.then(|| {
            let mut d_x = kernel::buffer(tokens * d);
            let mut mode = Into::Overwrite;
            for (map, dy) in self.maps.iter().zip(&d_outputs) {
                if let Some(dy) = dy {
                    frozen_linear::backward_into(&mut d_x, mode, dy.values(), tokens, &map.weight);
                    mode = Into::Add;
                }
            }
            downs.spread(&d_h, tokens, &mut d_x);
            self.norm.gradient(x, &self.scale, &mut d_x);
            Matrix::new(d_x, tokens, d)
        })];
        let mut d_a = d_a.into_iter();
        for (a_needed, d_b) in a_needed.into_iter().zip(d_b) {
            gradients.push(d_a.next().filter(|_| a_needed));
            gradients.push(d_b);
        }
        gradients
    }
}

fn zeros(rows: usize, cols: usize) -> Matrix {
    Matrix::new(vec![0.0; rows * cols], rows, cols)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::check::{self, Case};

    const D: usize = 19;
    const OUT: [usize; 3] = [9, 5, 6];

    fn weights() -> [FrozenMatrix; 3] {
        [0, 1, 2].map(|i| FrozenMatrix::from_values(check::values(OUT[i] * D, i as u64), OUT[i], D))
    }

    fn scale() -> FrozenMatrix {
        FrozenMatrix::from_values(check::values(D, 7), 1, D)
    }

    /// Maps of which some have a low-rank part, whose factors are `factors`, in turn.
    fn maps<'a>(
        weights: &'a [FrozenMatrix; 3],
        has_product: [bool; 3],
        factors: &[Tensor<2>],
    ) -> [NormedLinear<'a>; 3] {
        let mut pairs = factors.chunks_exact(2);
        let mut index = 0;
        weights.each_ref().map(|weight| {
            let has = has_product[index];
            index += 1;
            NormedLinear {
                weight,
                product: has.then(|| {
                    let pair = pairs.next().unwrap();
                    LowRank {
                        a: pair[0].clone(),
                        b: pair[1].clone(),
                        scaling: 0.5 * index as f32,
                    }
                }),
                tap: None,
            }
        })
    }

    fn shapes(tokens: usize, ranks: [usize; 3]) -> Vec<(usize, usize)> {
        let pairs = ranks.into_iter().zip(OUT).filter(|(rank, _)| *rank > 0);
        let factors = pairs.flat_map(|(rank, d_out)| [(rank, D), (d_out, rank)]);
        std::iter::once((tokens, D)).chain(factors).collect()
    }

    #[test]
    fn kernel_equals_definition_and_differences() {
        let (weights, scale) = (weights(), scale());
        for ranks in [[3, 2, 4], [3, 0, 2], [0, 2, 0], [0, 0, 0]] {
            let has = ranks.map(|rank| rank > 0);
            let joined = |outputs: [Tensor<2>; 3]| Tensor::cat(outputs.to_vec(), 1);
            check::operation(Case {
                shapes: &shapes(11, ranks),
                fused: |t| {
                    let maps = maps(&weights, has, &t[1..]);
                    joined(normed_linears(t[0].clone(), &scale, 1e-5, maps))
                },
                definition: |t| {
                    let maps = maps(&weights, has, &t[1..]);
                    joined(definition(t[0].clone(), &scale, 1e-5, maps))
                },
            });
        }
    }

    #[test]
    fn few_tokens_and_high_ranks_equal_the_definition() {
        let (weights, scale) = (weights(), scale());
        for (tokens, rank) in [(1, 3), (2, 3), (9, 21), (9, 22), (9, 70)] {
            check::equal(Case {
                shapes: &shapes(tokens, [rank; 3]),
                fused: |t| {
                    let maps = maps(&weights, [true; 3], &t[1..]);
                    Tensor::cat(normed_linears(t[0].clone(), &scale, 1e-5, maps).to_vec(), 1)
                },
                definition: |t| {
                    let maps = maps(&weights, [true; 3], &t[1..]);
                    Tensor::cat(definition(t[0].clone(), &scale, 1e-5, maps).to_vec(), 1)
                },
            });
        }
    }

    #[test]
    fn an_output_without_use_passes_zeros_on() {
        let (weights, scale) = (weights(), scale());
        let device = burn::tensor::Device::flex().autodiff();
        let leaf = |rows: usize, cols: usize, seed: u64| {
            crate::tensor(check::values(rows * cols, seed), rows, cols, &device).require_grad()
        };
        let x = leaf(11, D, 1);
        let factors = [
            leaf(3, D, 2),
            leaf(OUT[0], 3, 3),
            leaf(2, D, 4),
            leaf(OUT[1], 2, 5),
        ];
        // Factors that are computed themselves.
        let derived: Vec<Tensor<2>> = factors.iter().map(|t| t.clone() * 2.0).collect();
        let maps = maps(&weights, [true, true, false], &derived);
        let [q, _, v] = normed_linears(x.clone(), &scale, 1e-5, maps);
        let gradients = Tensor::cat(vec![q, v], 1).square().sum().backward();
        let of = |t: &Tensor<2>| crate::values(t.grad(&gradients).unwrap());
        assert!(of(&x).iter().all(|v| *v != 0.0));
        assert!(
            of(&factors[0])
                .iter()
                .chain(&of(&factors[1]))
                .any(|v| *v != 0.0)
        );
        assert_eq!(
            (of(&factors[2]), of(&factors[3])),
            (vec![0.0; 2 * D], vec![0.0; OUT[1] * 2])
        );
    }

    #[test]
    fn only_needed_gradients_are_given() {
        let op = NormedLinears {
            norm: RmsNorm { eps: 1e-5 },
            scale: Matrix::new(check::values(D, 7), 1, D),
            maps: weights().map(|weight| Map {
                weight,
                scaling: Some(1.0),
                tap: None,
            }),
        };
        for tokens in [0, 11] {
            let shapes = shapes(tokens, [3, 2, 4]);
            let inputs = shapes.iter().zip(1..);
            let inputs: Vec<Matrix> = inputs
                .map(|(&(r, c), seed)| Matrix::new(check::values(r * c, seed), r, c))
                .collect();
            for kept in 0..inputs.len() {
                let needed: Vec<bool> = (0..inputs.len()).map(|i| i == kept).collect();
                let (outputs, saved) = op.forward(&inputs, true);
                let all = vec![true; inputs.len()];
                let every = op.backward(saved.clone(), outputs.clone().map(Some), &all);
                let got = op.backward(saved, outputs.map(Some), &needed);
                for (index, (got, all)) in got.iter().zip(&every).enumerate() {
                    let want = all.as_ref().filter(|_| index == kept);
                    assert_eq!(got.as_ref().map(Matrix::values), want.map(Matrix::values));
                }
            }
        }
    }

    /// Sums of what it is told, by the name of the map.
    #[derive(Debug, Default)]
    struct Sums(Mutex<Vec<(String, f64, f64)>>);

    fn sum(values: &[f32]) -> f64 {
        values.iter().map(|v| f64::from(*v)).sum()
    }

    impl Tap for Sums {
        fn linear(&self, site: &str, x: &[f32], dy: &[f32], _: usize) {
            self.0
                .lock()
                .unwrap()
                .push((site.to_owned(), sum(x), sum(dy)));
        }

        fn input(&self, site: &str, x: &[f32], _: usize) {
            self.0.lock().unwrap().push((site.to_owned(), sum(x), 0.0));
        }
    }

    #[test]
    fn taps_are_told_as_by_the_definition() {
        let (weights, scale) = (weights(), scale());
        let device = burn::tensor::Device::flex().autodiff();
        let told = |fused: bool| {
            let sums = Arc::new(Sums::default());
            let x = crate::tensor(check::values(11 * D, 1), 11, D, &device).require_grad();
            let leaf = |rows: usize, cols: usize| {
                crate::tensor(check::values(rows * cols, 2), rows, cols, &device).require_grad()
            };
            let factors = [leaf(3, D), leaf(OUT[0], 3)];
            let mut maps = maps(&weights, [true, false, false], &factors);
            for (map, name) in maps.iter_mut().zip(["q", "k"]) {
                map.tap = Some((sums.clone(), name));
            }
            let outputs = match fused {
                true => normed_linears(x, &scale, 1e-5, maps),
                false => definition(x, &scale, 1e-5, maps),
            };
            Tensor::cat(outputs.to_vec(), 1).square().sum().backward();
            let mut told = std::mem::take(&mut *sums.0.lock().unwrap());
            told.sort_by(|a, b| a.partial_cmp(b).unwrap());
            told
        };
        let (got, want) = (told(true), told(false));
        assert_eq!(got.len(), 4);
        for (got, want) in got.iter().zip(&want) {
            assert_eq!(got.0, want.0);
            assert!(
                (got.1 - want.1).abs() < 1e-4 && (got.2 - want.2).abs() < 1e-3,
                "{got:?}"
            );
        }
    }
}
