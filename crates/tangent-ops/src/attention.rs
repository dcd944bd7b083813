//! Causal attention with rotary positions, grouped heads and an optional window over flat rows.
//!
//! `o_h = softmax(rot(q_h) rot(k_g)^T * scale + mask) v_g` for every query head `h` of group `g`.
//! Memory is linear in the row length: scores exist for one block of queries at a time and are
//! formed again in the backward pass.

mod block;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Tensor, activation};
use rayon::prelude::*;

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel::{self, Into, SharedMut, View, ViewMut};
use crate::rotary::{self, Rotary};
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
        custom::apply(op, [q, k, v])
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
            let q = rotary::definition(head(&q, h), segments.positions(), rotary, &device);
            let k = rotary::definition(head(&k, g), segments.positions(), rotary, &device);
            let scores = q.matmul(k.transpose()) * shape.scale() + mask.clone();
            activation::softmax(scores, 1).matmul(head(&v, g))
        })
        .collect();
    Tensor::cat(heads, 1)
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
    assert!(
        shape.heads.is_multiple_of(shape.kv_heads),
        "whole groups of heads"
    );
    let mut out = kernel::buffer(q.len());
    let shared = SharedMut::new(&mut out);
    let firsts = (0..n).step_by(shape.block_tokens());
    let tasks: Vec<_> = firsts
        .flat_map(|first| (0..shape.kv_heads).map(move |g| (first, g)))
        .collect();
    let task = |&(first, g): &(usize, usize)| {
        let mut block = Block::new(shape, shape.block_tokens().min(n), total);
        let tokens = shape.block_tokens().min(n - first);
        block.gather(q, first, tokens, g, None);
        let k = View::new(&keys[g * d..], total, d, kv_width);
        block.probabilities(k, tokens, total - n + first);
        block.weigh(View::new(&values[g * d..], total, d, kv_width));
        // SAFETY: every task writes its own columns of its own rows.
        unsafe { block.scatter(shared, first, g) };
    };
    // Waking threads costs more than a short cache's products.
    if n * total * q_width < 1 << 16 {
        tasks.iter().for_each(task);
    } else {
        tasks.par_iter().with_max_len(1).for_each(task);
    }
    out
}

#[derive(Debug)]
struct Attention {
    segments: Arc<Segments>,
    rotary: Arc<Rotary>,
    shape: AttentionShape,
}

/// Tokens of one segment that are computed at one time.
#[derive(Clone, Copy)]
struct Queries {
    first: usize,
    tokens: usize,
    /// Position of the first.
    position: usize,
}

/// Gradients of the keys and values that one segment sees of one key head, `(visible, head_dim)`.
type Part = (Vec<f32>, Vec<f32>);

/// Visible tokens, per token of the batch, whose parts may exist at one time.
const VISIBLE_AT_ONCE: usize = 4;

impl Attention {
    fn queries(&self, segment: usize) -> impl Iterator<Item = Queries> {
        let own = self.segments.list()[segment];
        let step = self.shape.block_tokens();
        let depth = match own.len {
            0 => 0,
            _ => self.segments.positions()[own.start] as usize,
        };
        (0..own.len).step_by(step).map(move |at| Queries {
            first: own.start + at,
            tokens: step.min(own.len - at),
            position: depth + at,
        })
    }

    /// Room for the blocks of a segment that sees so many tokens.
    fn block(&self, segment: usize, total: usize) -> Block {
        let len = self.segments.list()[segment].len;
        let tokens = self.shape.block_tokens().min(len);
        Block::new(self.shape, tokens, total).steady(self.segments.is_steady())
    }

    /// The rows of key head `g` that lie in `ranges`, gathered where these are several.
    fn rows<'a>(
        &self,
        x: &'a [f32],
        ranges: &[Range<usize>],
        g: usize,
        gathered: &'a mut Vec<f32>,
    ) -> View<'a> {
        let d = self.shape.head_dim;
        let width = self.shape.kv_heads * d;
        if let [only] = ranges {
            return View::new(&x[only.start * width + g * d..], only.len(), d, width);
        }
        for token in ranges.iter().flat_map(Clone::clone) {
            gathered.extend_from_slice(&x[token * width + g * d..][..d]);
        }
        View::dense(gathered, gathered.len() / d, d)
    }

    /// Every head of `x: (tokens, heads of keys)` turned by its token's position, or back.
    fn rotate_keys(&self, x: &mut [f32], inverse: bool) {
        let width = self.shape.kv_heads * self.shape.head_dim;
        let positions = self.segments.positions();
        x.par_chunks_mut(width.max(1))
            .zip(positions)
            .with_min_len(64)
            .for_each(|(row, &position)| self.rotary.rotate_in_place(row, position, inverse));
    }

    fn forward_task(
        &self,
        (segment, queries, g): (usize, Queries, usize),
        [q, k, v]: [&[f32]; 3],
        out: SharedMut,
    ) {
        let ranges = self.segments.visible(segment);
        let (mut k_rows, mut v_rows) = (vec![], vec![]);
        let total = ranges.iter().map(ExactSizeIterator::len).sum();
        let mut block = self.block(segment, total);
        let rotation = Some((&*self.rotary, self.segments.positions()));
        block.gather(q, queries.first, queries.tokens, g, rotation);
        let keys = self.rows(k, &ranges, g, &mut k_rows);
        block.probabilities(keys, queries.tokens, queries.position);
        block.weigh(self.rows(v, &ranges, g, &mut v_rows));
        // SAFETY: tasks own disjoint (tokens of a segment) x (columns of a group).
        unsafe { block.scatter(out, queries.first, g) };
    }

    /// Writes the gradient of the segment's queries and returns its part of those of the keys,
    /// still rotated, and values.
    fn backward_task(
        &self,
        (segment, g): (usize, usize),
        [q, k, v, d_out]: [&[f32]; 4],
        d_q: SharedMut,
    ) -> Part {
        let d = self.shape.head_dim;
        let ranges = self.segments.visible(segment);
        let total: usize = ranges.iter().map(ExactSizeIterator::len).sum();
        let (mut k_rows, mut v_rows) = (vec![], vec![]);
        let keys = self.rows(k, &ranges, g, &mut k_rows);
        let values = self.rows(v, &ranges, g, &mut v_rows);
        let positions = self.segments.positions();
        let (mut d_k, mut d_v) = (vec![0f32; total * d], vec![0f32; total * d]);
        let mut block = self.block(segment, total);
        let (mut d_p, mut d_o) = (vec![], vec![]);
        for queries in self.queries(segment) {
            let Queries { first, tokens, .. } = queries;
            block.gather(q, first, tokens, g, Some((&self.rotary, positions)));
            block.probabilities(keys, tokens, queries.position);
            let (rows, n) = (block.rows, block.keys);
            let seen = block.low * d..(block.low + n) * d;
            let d_o = room(&mut d_o, rows * d);
            copy_group(d_o, d_out, first, g, &self.shape);
            let d_o = View::dense(d_o, rows, d);
            let d_v = ViewMut::dense(&mut d_v[seen.clone()], n, d);
            product(d_v, Into::Add, block.scores().t(), d_o);
            let stride = block.stride;
            let d_p = block.of_values(&mut d_p, d_o, values);
            let p = &mut block.p[..rows * stride];
            softmax_backward(p, d_p, (n, stride), self.shape.scale());
            // What were the probabilities are the gradients of the scores now.
            let d_k = ViewMut::dense(&mut d_k[seen], n, d);
            product(d_k, Into::Add, block.scores().t(), block.queries());
            // The block's output is now the gradient of its queries.
            block.weigh(keys);
            let group = self.shape.group() * d;
            let d_queries = block.output[..rows * d].chunks_exact_mut(group);
            for (rows, &position) in d_queries.zip(&positions[first..]) {
                self.rotary.rotate_in_place(rows, position, true);
            }
            // SAFETY: tasks own disjoint (tokens of a segment) x (columns of a group).
            unsafe { block.scatter(d_q, first, g) };
        }
        (d_k, d_v)
    }

    /// Runs of segments whose parts may exist at one time.
    fn chunks(&self) -> Vec<Range<usize>> {
        let limit = VISIBLE_AT_ONCE * self.segments.tokens();
        let (mut chunks, mut start, mut visible) = (vec![], 0, 0);
        for (index, segment) in self.segments.list().iter().enumerate() {
            let end = segment.start + segment.len;
            let seen = match segment.len {
                0 => 0,
                _ => self.segments.positions()[end - 1] as usize + 1,
            };
            if index > start && visible + seen > limit {
                chunks.push(start..index);
                (start, visible) = (index, 0);
            }
            visible += seen;
        }
        chunks.push(start..self.segments.list().len());
        chunks
    }

    /// Adds the parts of the segments `chunk` to the gradients of the keys and values they share,
    /// in the order of segments, so that the sums do not depend on threads.
    fn add_parts(&self, chunk: &Range<usize>, parts: &[Part], [d_k, d_v]: [SharedMut; 2]) {
        let (d, kv_heads) = (self.shape.head_dim, self.shape.kv_heads);
        let width = kv_heads * d;
        let trees = self.segments.trees().iter();
        let tasks: Vec<_> = trees
            .flat_map(|tree| (0..kv_heads).map(move |g| (tree, g)))
            .collect();
        tasks.into_par_iter().for_each(|(tree, g)| {
            for &segment in tree.iter().filter(|s| chunk.contains(s)) {
                let (part_k, part_v) = &parts[(segment - chunk.start) * kv_heads + g];
                let tokens = self.segments.visible(segment).into_iter().flatten();
                let rows = part_k.chunks_exact(d).zip(part_v.chunks_exact(d));
                for (token, (part_k, part_v)) in tokens.zip(rows) {
                    for (shared, part) in [(d_k, part_k), (d_v, part_v)] {
                        // SAFETY: a segment sees tokens of its own tree only, so tasks own
                        // disjoint (tokens of a tree) x (columns of a head).
                        let sum = unsafe { shared.slice(token * width + g * d, d) };
                        for (sum, v) in sum.iter_mut().zip(part) {
                            *sum += v;
                        }
                    }
                }
            }
        });
    }
}

/// Turns probabilities into score gradients: `p * (dp - <p, dp>) * scale`, row by row; rows of
/// `keys` values lie `stride` apart.
fn softmax_backward(p: &mut [f32], d_p: &[f32], (keys, stride): (usize, usize), scale: f32) {
    kernel::simd(
        #[inline(always)]
        || {
            for (p, d_p) in p.chunks_exact_mut(stride).zip(d_p.chunks_exact(stride)) {
                let (p, d_p) = (&mut p[..keys], &d_p[..keys]);
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
        assert_eq!(self.rotary.head_dim(), d, "features that are rotated");
        assert!(
            self.shape.heads.is_multiple_of(self.shape.kv_heads),
            "whole groups of heads"
        );
        let mut rotated = k.values().to_vec();
        self.rotate_keys(&mut rotated, false);
        let mut out = kernel::buffer(q.rows() * q.cols());
        let shared = SharedMut::new(&mut out);
        let values = [q.values(), &rotated, v.values()];
        let segments = 0..self.segments.list().len();
        let tasks: Vec<_> = segments
            .flat_map(|s| self.queries(s).map(move |queries| (s, queries)))
            .flat_map(|(s, queries)| (0..self.shape.kv_heads).map(move |g| (s, queries, g)))
            .collect();
        tasks
            .into_par_iter()
            .with_max_len(1)
            .for_each(|task| self.forward_task(task, values, shared));
        let out = Matrix::new(out, q.rows(), q.cols());
        if !tracked {
            return (out, vec![]);
        }
        let rotated = Matrix::new(rotated, k.rows(), k.cols());
        (out, vec![q.clone(), rotated, v.clone()])
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        let (q, k, v) = (&saved[0], &saved[1], &saved[2]);
        let n = q.rows();
        let mut d_q = kernel::buffer(n * q.cols());
        let (mut d_k, mut d_v) = (vec![0f32; n * k.cols()], vec![0f32; n * v.cols()]);
        let [q_shared, k_shared, v_shared] =
            [&mut d_q, &mut d_k, &mut d_v].map(|d| SharedMut::new(d));
        let values = [q, k, v, &dy].map(Matrix::values);
        for chunk in self.chunks() {
            let tasks: Vec<_> = chunk
                .clone()
                .flat_map(|s| (0..self.shape.kv_heads).map(move |g| (s, g)))
                .collect();
            let parts: Vec<Part> = tasks
                .into_par_iter()
                .with_max_len(1)
                .map(|task| self.backward_task(task, values, q_shared))
                .collect();
            self.add_parts(&chunk, &parts, [k_shared, v_shared]);
        }
        self.rotate_keys(&mut d_k, true);
        vec![
            Some(Matrix::new(d_q, n, q.cols())),
            Some(Matrix::new(d_k, n, k.cols())),
            Some(Matrix::new(d_v, n, v.cols())),
        ]
    }
}
