//! Causal attention with rotary positions, grouped heads and an optional window over flat rows.
//!
//! `o_h = softmax(rot(q_h) rot(k_g)^T * scale + mask) v_g` for every query head `h` of group `g`.
//! Memory is linear in the row length: scores exist for one block of queries at a time and are
//! formed again in the backward pass.

mod block;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, activation};
use rayon::prelude::*;

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel::{self, Into, SharedMut, View, ViewMut};
use crate::rotary::Rotary;
use crate::segments::Segments;
use block::{Block, copy_group, product, room};

/// Heads and scale of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Tokens that a token sees, itself included; all earlier ones when `None`.
    pub window: Option<usize>,
}

impl AttentionShape {
    fn scale(&self) -> f32 {
        (self.head_dim as f32).sqrt().recip()
    }

    /// First visible key of a query at `position`.
    fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }
}

/// Attention of `q: (tokens, heads * head_dim)` over `k, v: (tokens, kv_heads * head_dim)`.
/// The rotary table must cover every position of `segments`.
pub fn attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    segments: &Arc<Segments>,
    rotary: &Arc<Rotary>,
    shape: AttentionShape,
) -> Tensor<2> {
    if custom::has_kernels(&q) {
        let op = Attention {
            segments: segments.clone(),
            rotary: rotary.clone(),
            shape,
        };
        custom::apply3(op, q, k, v)
    } else {
        definition(q, k, v, segments, rotary, shape)
    }
}

/// The definition in plain tensor operations: one dense mask over all tokens.
pub fn definition(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    segments: &Segments,
    rotary: &Rotary,
    shape: AttentionShape,
) -> Tensor<2> {
    let n = segments.tokens();
    let d = shape.head_dim;
    let device = q.device().without_autodiff();
    let mut mask = vec![f32::NEG_INFINITY; n * n];
    for (index, segment) in segments.list().iter().enumerate() {
        let keys: Vec<usize> = segments.visible(index).into_iter().flatten().collect();
        for token in segment.start..segment.start + segment.len {
            let position = segments.positions()[token] as usize;
            for &key in &keys[shape.first_key(position)..=position] {
                mask[token * n + key] = 0.0;
            }
        }
    }
    let mask = crate::tensor(mask, n, n, &device);
    let head = |x: &Tensor<2>, h: usize| x.clone().slice([0..n, h * d..(h + 1) * d]);
    let heads = (0..shape.heads)
        .map(|h| {
            let g = h / (shape.heads / shape.kv_heads);
            let q = rotate_definition(head(&q, h), segments.positions(), rotary, &device);
            let k = rotate_definition(head(&k, g), segments.positions(), rotary, &device);
            let scores = q.matmul(k.transpose()) * shape.scale() + mask.clone();
            activation::softmax(scores, 1).matmul(head(&v, g))
        })
        .collect();
    Tensor::cat(heads, 1)
}

fn rotate_definition(
    x: Tensor<2>,
    positions: &[u32],
    rotary: &Rotary,
    device: &Device,
) -> Tensor<2> {
    let [n, d] = x.dims();
    let half = d / 2;
    let angles = positions.iter().map(|&p| rotary.at(p));
    let (cos, sin): (Vec<_>, Vec<_>) = angles.unzip();
    let table = |rows: Vec<&[f32]>| crate::tensor(rows.concat(), n, half, device);
    let (cos, sin) = (table(cos), table(sin));
    let low = x.clone().slice([0..n, 0..half]);
    let high = x.slice([0..n, half..d]);
    Tensor::cat(
        vec![
            low.clone() * cos.clone() - high.clone() * sin.clone(),
            high * cos + low * sin,
        ],
        1,
    )
}

/// Attention of rotated queries that continue a cache of rotated keys; no gradient.
///
/// `q: (n, heads * head_dim)` are the last `n` of `total` tokens; `keys` and `values` hold
/// `(total, kv_heads * head_dim)`. Returns `(n, heads * head_dim)`.
pub fn attend(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    total: usize,
    shape: AttentionShape,
) -> Vec<f32> {
    let d = shape.head_dim;
    let (q_width, kv_width) = (shape.heads * d, shape.kv_heads * d);
    let n = q.len() / q_width;
    assert_eq!(q.len(), n * q_width, "whole rows of queries");
    assert!(n <= total && keys.len() == total * kv_width && values.len() == keys.len());
    let mut out = kernel::buffer(q.len());
    let shared = SharedMut::new(&mut out);
    let head = |g: usize| {
        let mut block = Block::new(shape);
        for first in (0..n).step_by(shape.block_tokens()) {
            let tokens = shape.block_tokens().min(n - first);
            let position = total - n + first;
            // Under a window, earlier keys than the first query's are not looked at.
            let low = shape.first_key(position);
            let k = View::new(&keys[low * kv_width + g * d..], total - low, d, kv_width);
            let v = View::new(&values[low * kv_width + g * d..], total - low, d, kv_width);
            block.gather(q, first, tokens, g, None);
            block.probabilities(k, tokens, position, low);
            block.weigh(v);
            // SAFETY: every group of heads writes its own columns of every row.
            unsafe { block.scatter(shared, first, g) };
        }
    };
    // Waking threads costs more than a short cache's products.
    if n * total * q_width < 1 << 16 {
        (0..shape.kv_heads).for_each(head);
    } else {
        (0..shape.kv_heads).into_par_iter().for_each(head);
    }
    out
}

#[derive(Debug)]
struct Attention {
    segments: Arc<Segments>,
    rotary: Arc<Rotary>,
    shape: AttentionShape,
}

/// What one segment sees of one key head, in the order of positions.
struct Visible {
    /// Token of each key.
    tokens: Vec<usize>,
    /// `(tokens, head_dim)` rotated keys.
    keys: Vec<f32>,
    /// `(tokens, head_dim)` values.
    values: Vec<f32>,
}

impl Attention {
    /// Every (segment, key head) pair.
    fn tasks(&self) -> Vec<(usize, usize)> {
        let heads = 0..self.shape.kv_heads;
        let segments = 0..self.segments.list().len();
        segments
            .flat_map(|s| heads.clone().map(move |g| (s, g)))
            .collect()
    }

    fn visible(&self, segment: usize, g: usize, k: &[f32], v: &[f32]) -> Visible {
        let d = self.shape.head_dim;
        let width = self.shape.kv_heads * d;
        let ranges = self.segments.visible(segment).into_iter();
        let tokens: Vec<usize> = ranges.flatten().collect();
        let mut keys = kernel::buffer(tokens.len() * d);
        let mut values = kernel::buffer(tokens.len() * d);
        let rows = keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d));
        for ((position, &token), (key, value)) in tokens.iter().enumerate().zip(rows) {
            key.copy_from_slice(&k[token * width + g * d..][..d]);
            value.copy_from_slice(&v[token * width + g * d..][..d]);
            self.rotary.rotate_in_place(key, position as u32, false);
        }
        Visible {
            tokens,
            keys,
            values,
        }
    }

    /// Calls `f(first_token, tokens, position_of_the_first)` for the blocks of a segment.
    fn for_each_block(
        &self,
        segment: usize,
        seen: &Visible,
        mut f: impl FnMut(usize, usize, usize),
    ) {
        let own = &self.segments.list()[segment];
        let depth = seen.tokens.len() - own.len;
        for at in (0..own.len).step_by(self.shape.block_tokens()) {
            let tokens = self.shape.block_tokens().min(own.len - at);
            f(own.start + at, tokens, depth + at);
        }
    }

    fn forward_task(&self, segment: usize, g: usize, [q, k, v]: [&[f32]; 3], out: SharedMut) {
        let d = self.shape.head_dim;
        let seen = self.visible(segment, g, k, v);
        let total = seen.tokens.len();
        let rotation = Some((&*self.rotary, self.segments.positions()));
        let mut block = Block::new(self.shape);
        self.for_each_block(segment, &seen, |first, tokens, position| {
            block.gather(q, first, tokens, g, rotation);
            block.probabilities(View::dense(&seen.keys, total, d), tokens, position, 0);
            block.weigh(View::dense(&seen.values, total, d));
            // SAFETY: tasks own disjoint (tokens of a segment) x (columns of a group).
            unsafe { block.scatter(out, first, g) };
        });
    }

    /// Writes the gradient of the segment's queries; returns its part of the gradients of the
    /// keys and values it sees, `(visible, head_dim)` each.
    fn backward_task(
        &self,
        segment: usize,
        g: usize,
        [q, k, v, d_out]: [&[f32]; 4],
        d_q: SharedMut,
    ) -> (Vec<f32>, Vec<f32>) {
        let d = self.shape.head_dim;
        let seen = self.visible(segment, g, k, v);
        let total = seen.tokens.len();
        let (keys, values) = (
            View::dense(&seen.keys, total, d),
            View::dense(&seen.values, total, d),
        );
        let positions = self.segments.positions();
        let (mut d_k, mut d_v) = (vec![0f32; total * d], vec![0f32; total * d]);
        let (mut block, mut d_p, mut d_o) = (Block::new(self.shape), vec![], vec![]);
        self.for_each_block(segment, &seen, |first, tokens, position| {
            block.gather(q, first, tokens, g, Some((&self.rotary, positions)));
            block.probabilities(keys, tokens, position, 0);
            let (rows, n) = (block.rows, block.keys);
            let d_o = room(&mut d_o, rows * d);
            copy_group(d_o, d_out, first, g, &self.shape);
            let d_o = View::dense(d_o, rows, d);
            let d_v = ViewMut::dense(&mut d_v[..n * d], n, d);
            let p = View::dense(&block.p[..rows * n], rows, n);
            product(d_v, Into::Add, p.t(), d_o);
            let d_p = room(&mut d_p, rows * n);
            let dst = ViewMut::dense(d_p, rows, n);
            product(dst, Into::Overwrite, d_o, values.first_rows(n).t());
            softmax_backward(&mut block.p[..rows * n], d_p, n, self.shape.scale());
            let d_k = ViewMut::dense(&mut d_k[..n * d], n, d);
            let d_scores = View::dense(&block.p[..rows * n], rows, n);
            product(d_k, Into::Add, d_scores.t(), block.queries());
            // The block's output is now the gradient of its queries.
            block.weigh(keys);
            let group = self.shape.group() * d;
            for (t, rows) in block.output[..rows * d].chunks_exact_mut(group).enumerate() {
                self.rotary
                    .rotate_in_place(rows, positions[first + t], true);
            }
            // SAFETY: tasks own disjoint (tokens of a segment) x (columns of a group).
            unsafe { block.scatter(d_q, first, g) };
        });
        for (position, d_key) in d_k.chunks_exact_mut(d).enumerate() {
            self.rotary.rotate_in_place(d_key, position as u32, true);
        }
        (d_k, d_v)
    }

    /// Adds up what the segments of every tree found for the keys and values they share, in the
    /// order of segments, so that the sum does not depend on threads.
    fn gather_parts(&self, parts: &[(Vec<f32>, Vec<f32>)]) -> [Vec<f32>; 2] {
        let (d, heads) = (self.shape.head_dim, self.shape.kv_heads);
        let width = heads * d;
        let n = self.segments.tokens();
        let (mut d_k, mut d_v) = (vec![0f32; n * width], vec![0f32; n * width]);
        let (k_shared, v_shared) = (SharedMut::new(&mut d_k), SharedMut::new(&mut d_v));
        let trees = self.segments.trees().par_iter();
        trees.for_each(|tree| {
            for (&segment, g) in tree.iter().flat_map(|s| (0..heads).map(move |g| (s, g))) {
                let (part_k, part_v) = &parts[segment * heads + g];
                let tokens = self.segments.visible(segment).into_iter().flatten();
                let rows = part_k.chunks_exact(d).zip(part_v.chunks_exact(d));
                for (token, (part_k, part_v)) in tokens.zip(rows) {
                    for (shared, part) in [(k_shared, part_k), (v_shared, part_v)] {
                        // SAFETY: trees own disjoint tokens.
                        let sum = unsafe { shared.slice(token * width + g * d, d) };
                        for (sum, v) in sum.iter_mut().zip(part) {
                            *sum += v;
                        }
                    }
                }
            }
        });
        [d_k, d_v]
    }
}

/// Turns probabilities into score gradients: `p * (dp - <p, dp>) * scale`, row by row.
fn softmax_backward(p: &mut [f32], d_p: &[f32], keys: usize, scale: f32) {
    kernel::simd(
        #[inline(always)]
        || {
            for (p, d_p) in p.chunks_exact_mut(keys).zip(d_p.chunks_exact(keys)) {
                let mean = kernel::dot(p, d_p);
                for (p, d_p) in p.iter_mut().zip(d_p) {
                    *p *= (d_p - mean) * scale;
                }
            }
        },
    );
}

impl CpuOp for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
        let (n, d) = (self.segments.tokens(), self.shape.head_dim);
        assert_eq!((q.rows(), q.cols()), (n, self.shape.heads * d), "queries");
        assert_eq!((k.rows(), k.cols()), (n, self.shape.kv_heads * d), "keys");
        assert_eq!((v.rows(), v.cols()), (n, k.cols()), "values");
        let mut out = kernel::buffer(q.rows() * q.cols());
        let shared = SharedMut::new(&mut out);
        let values = [q, k, v].map(Matrix::values);
        self.tasks()
            .into_par_iter()
            .with_max_len(1)
            .for_each(|(segment, g)| self.forward_task(segment, g, values, shared));
        let saved = if tracked { inputs.to_vec() } else { vec![] };
        (Matrix::new(out, q.rows(), q.cols()), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        let (q, k, v) = (&saved[0], &saved[1], &saved[2]);
        let n = q.rows();
        let mut d_q = kernel::buffer(n * q.cols());
        let shared = SharedMut::new(&mut d_q);
        let values = [q, k, v, &dy].map(Matrix::values);
        let parts: Vec<(Vec<f32>, Vec<f32>)> = self
            .tasks()
            .into_par_iter()
            .with_max_len(1)
            .map(|(segment, g)| self.backward_task(segment, g, values, shared))
            .collect();
        let [d_k, d_v] = self.gather_parts(&parts);
        vec![
            Some(Matrix::new(d_q, n, q.cols())),
            Some(Matrix::new(d_k, n, k.cols())),
            Some(Matrix::new(d_v, n, v.cols())),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::block::BLOCK_ROWS;
    use super::*;
    use crate::Segment;
    use crate::check::{self, Case};

    fn rotary() -> Arc<Rotary> {
        Arc::new(Rotary::new(vec![1.0, 0.3], 400))
    }

    fn shape(window: Option<usize>) -> AttentionShape {
        AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            window,
        }
    }

    fn forest() -> Segments {
        let segment = |start, len, ancestors: &[usize]| Segment {
            start,
            len,
            ancestors: ancestors.to_vec(),
        };
        Segments::new(vec![
            segment(0, 3, &[]),
            segment(3, 2, &[0]),
            segment(5, 1, &[0]),
            segment(6, 2, &[0, 2]),
            segment(8, 4, &[]),
        ])
    }

    #[test]
    fn kernel_equals_definition_and_differences() {
        for (segments, window) in [
            (Segments::rows(&[5, 1, 3]), None),
            (Segments::rows(&[9, 2]), Some(3)),
            (forest(), None),
            (forest(), Some(2)),
        ] {
            let (n, segments, rotary) = (segments.tokens(), Arc::new(segments), rotary());
            check::operation(Case {
                shapes: &[(n, 16), (n, 8), (n, 8)],
                fused: |t| {
                    let [q, k, v] = [t[0].clone(), t[1].clone(), t[2].clone()];
                    attention(q, k, v, &segments, &rotary, shape(window))
                },
                definition: |t| {
                    let [q, k, v] = [t[0].clone(), t[1].clone(), t[2].clone()];
                    definition(q, k, v, &segments, &rotary, shape(window))
                },
            });
        }
    }

    #[test]
    fn long_rows_equal_definition_across_blocks() {
        let n = BLOCK_ROWS + 7;
        let (segments, rotary) = (Arc::new(Segments::rows(&[n, 3])), rotary());
        check::equal(Case {
            shapes: &[(n + 3, 16), (n + 3, 8), (n + 3, 8)],
            fused: |t| {
                let [q, k, v] = [t[0].clone(), t[1].clone(), t[2].clone()];
                attention(q, k, v, &segments, &rotary, shape(Some(150)))
            },
            definition: |t| {
                let [q, k, v] = [t[0].clone(), t[1].clone(), t[2].clone()];
                definition(q, k, v, &segments, &rotary, shape(Some(150)))
            },
        });
    }

    #[test]
    fn cached_steps_equal_the_whole_row() {
        let (n, rotary) = (11, rotary());
        let segments = Arc::new(Segments::rows(&[n]));
        let (q, k, v) = (
            check::values(n * 16, 1),
            check::values(n * 8, 2),
            check::values(n * 8, 3),
        );
        let device = Device::flex();
        let whole = crate::values(attention(
            crate::tensor(q.clone(), n, 16, &device),
            crate::tensor(k.clone(), n, 8, &device),
            crate::tensor(v.clone(), n, 8, &device),
            &segments,
            &rotary,
            shape(Some(6)),
        ));
        let (mut q, mut k) = (q, k);
        rotary.rotate(&mut q, segments.positions());
        rotary.rotate(&mut k, segments.positions());
        for (from, to) in [(0, 4), (4, 5), (5, 11)] {
            let (q, k, v) = (&q[from * 16..to * 16], &k[..to * 8], &v[..to * 8]);
            let part = attend(q, k, v, to, shape(Some(6)));
            check::close(&part, &whole[from * 16..to * 16], 1e-5);
        }
    }
}
