//! Causal attention with rotary positions, grouped heads and an optional window over flat rows.
//!
//! `o_h = softmax(rot(q_h) rot(k_g)^T * scale + mask) v_g` for every query head `h` of group `g`.
//! Memory is linear in the row length: scores exist for one block of queries at a time and are
//! formed again in the backward pass.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, activation};
use rayon::prelude::*;

use crate::custom::{self, CpuOp, Matrix};
use crate::kernel::{self, Into, SharedMut, Threads, View, ViewMut};
use crate::rotary::Rotary;
use crate::segments::Segments;

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
    let table = |pick: fn(&(f32, f32)) -> f32| {
        let values = positions
            .iter()
            .flat_map(|&p| rotary.at(p).iter().map(pick))
            .collect();
        crate::tensor(values, n, half, device)
    };
    let (cos, sin) = (table(|t| t.0), table(|t| t.1));
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

/// Queries whose scores exist at one time.
const QUERY_BLOCK: usize = 128;

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
    (0..shape.heads).into_par_iter().for_each(|h| {
        let g = h / (shape.heads / shape.kv_heads);
        let k = View::new(&keys[g * d..], total, d, kv_width);
        let v = View::new(&values[g * d..], total, d, kv_width);
        let mut block = Block::default();
        for first in (0..n).step_by(QUERY_BLOCK) {
            let rows = QUERY_BLOCK.min(n - first);
            let q = View::new(&q[first * q_width + h * d..], rows, d, q_width);
            block.probabilities(q, k, rows, total - n + first, &shape);
            let o = block.weighted(v, rows, d);
            for (row, o) in o.chunks_exact(d).enumerate() {
                // SAFETY: every head writes its own columns of every row.
                let out = unsafe { shared.slice((first + row) * q_width + h * d, d) };
                out.copy_from_slice(o);
            }
        }
    });
    out
}

/// Scores of one block of queries of one head.
#[derive(Default)]
struct Block {
    /// `(rows, keys)` probabilities.
    p: Vec<f32>,
    /// Keys of the block, those after the last query left out.
    keys: usize,
    output: Vec<f32>,
}

/// Grows `values` to `len` without clearing what kernels overwrite anyway.
fn room(values: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if values.len() < len {
        *values = kernel::buffer(len);
    }
    &mut values[..len]
}

impl Block {
    /// Fills `p` for `rows` queries of which the first has position `first`.
    fn probabilities(
        &mut self,
        q: View<'_>,
        k: View<'_>,
        rows: usize,
        first: usize,
        shape: &AttentionShape,
    ) {
        let keys = first + rows;
        self.keys = keys;
        let p = room(&mut self.p, rows * keys);
        let dst = ViewMut::dense(p, rows, keys);
        let k = k.first_rows(keys);
        kernel::matmul(dst, Into::Overwrite, shape.scale(), q, k.t(), Threads::One);
        kernel::simd(|| {
            for (row, p) in p.chunks_exact_mut(keys).enumerate() {
                let position = first + row;
                let (low, high) = (shape.first_key(position), position + 1);
                p[..low].fill(0.0);
                p[high..].fill(0.0);
                let (_, sum) = kernel::exp_minus_max(&mut p[low..high]);
                let inverse = sum.recip();
                for v in &mut p[low..high] {
                    *v *= inverse;
                }
            }
        });
    }

    /// `p @ v`.
    fn weighted(&mut self, v: View<'_>, rows: usize, d: usize) -> &[f32] {
        let out = room(&mut self.output, rows * d);
        kernel::matmul(
            ViewMut::dense(out, rows, d),
            Into::Overwrite,
            1.0,
            View::dense(&self.p[..rows * self.keys], rows, self.keys),
            v.first_rows(self.keys),
            Threads::One,
        );
        out
    }
}

#[derive(Debug)]
struct Attention {
    segments: Arc<Segments>,
    rotary: Arc<Rotary>,
    shape: AttentionShape,
}

/// Rows of one head that a segment sees, gathered where they lie in several runs.
fn visible_rows<'a>(
    x: &'a [f32],
    gathered: &'a mut Vec<f32>,
    ranges: &[std::ops::Range<usize>],
    (width, column, d): (usize, usize, usize),
) -> View<'a> {
    if let [only] = ranges {
        return View::new(&x[only.start * width + column..], only.len(), d, width);
    }
    gathered.clear();
    for token in ranges.iter().flat_map(Clone::clone) {
        gathered.extend_from_slice(&x[token * width + column..][..d]);
    }
    View::dense(gathered, gathered.len() / d, d)
}

impl Attention {
    /// Every (tree, key head) pair: segments of one tree may share keys, so one task owns them.
    fn tasks(&self) -> Vec<(&[usize], usize)> {
        self.segments
            .trees()
            .iter()
            .flat_map(|tree| (0..self.shape.kv_heads).map(move |g| (&tree[..], g)))
            .collect()
    }

    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn forward_task(
        &self,
        tree: &[usize],
        g: usize,
        [q, k, v]: [&[f32]; 3],
        out: SharedMut,
        block: &mut Block,
    ) {
        let d = self.shape.head_dim;
        let (q_width, kv_width) = (self.shape.heads * d, self.shape.kv_heads * d);
        let (mut k_rows, mut v_rows) = (vec![], vec![]);
        for &index in tree {
            let segment = &self.segments.list()[index];
            let ranges = self.segments.visible(index);
            let depth = ranges.iter().map(ExactSizeIterator::len).sum::<usize>() - segment.len;
            let keys = visible_rows(k, &mut k_rows, &ranges, (kv_width, g * d, d));
            let values = visible_rows(v, &mut v_rows, &ranges, (kv_width, g * d, d));
            for h in g * self.group()..(g + 1) * self.group() {
                for first in (0..segment.len).step_by(QUERY_BLOCK) {
                    let rows = QUERY_BLOCK.min(segment.len - first);
                    let start = (segment.start + first) * q_width + h * d;
                    let q = View::new(&q[start..], rows, d, q_width);
                    block.probabilities(q, keys, rows, depth + first, &self.shape);
                    let o = block.weighted(values, rows, d);
                    for (row, o) in o.chunks_exact(d).enumerate() {
                        // SAFETY: tasks own disjoint (tokens of a tree) x (columns of a head).
                        let out = unsafe { out.slice(start + row * q_width, d) };
                        out.copy_from_slice(o);
                    }
                }
            }
        }
    }

    fn backward_task(
        &self,
        tree: &[usize],
        g: usize,
        [q, k, v, d_out]: [&[f32]; 4],
        [d_q, d_k, d_v]: [SharedMut; 3],
    ) {
        let d = self.shape.head_dim;
        let (q_width, kv_width) = (self.shape.heads * d, self.shape.kv_heads * d);
        let (mut k_rows, mut v_rows, mut block) = (vec![], vec![], Block::default());
        let (mut d_p, mut d_q_block) = (vec![], vec![]);
        for &index in tree {
            let segment = &self.segments.list()[index];
            let ranges = self.segments.visible(index);
            let total: usize = ranges.iter().map(ExactSizeIterator::len).sum();
            let depth = total - segment.len;
            let keys = visible_rows(k, &mut k_rows, &ranges, (kv_width, g * d, d));
            let values = visible_rows(v, &mut v_rows, &ranges, (kv_width, g * d, d));
            let (mut dk_rows, mut dv_rows) = (vec![0f32; total * d], vec![0f32; total * d]);
            for h in g * self.group()..(g + 1) * self.group() {
                for first in (0..segment.len).step_by(QUERY_BLOCK) {
                    let rows = QUERY_BLOCK.min(segment.len - first);
                    let start = (segment.start + first) * q_width + h * d;
                    let q = View::new(&q[start..], rows, d, q_width);
                    let d_o = View::new(&d_out[start..], rows, d, q_width);
                    block.probabilities(q, keys, rows, depth + first, &self.shape);
                    let n_keys = block.keys;
                    let p = &mut block.p[..rows * n_keys];
                    let dv_dst = ViewMut::dense(&mut dv_rows[..n_keys * d], n_keys, d);
                    product(dv_dst, Into::Add, View::dense(p, rows, n_keys).t(), d_o);
                    let d_p = room(&mut d_p, rows * n_keys);
                    let dp_dst = ViewMut::dense(d_p, rows, n_keys);
                    let values_t = values.first_rows(n_keys).t();
                    product(dp_dst, Into::Overwrite, d_o, values_t);
                    softmax_backward(p, d_p, n_keys, self.shape.scale());
                    let d_s = View::dense(p, rows, n_keys);
                    let dq = room(&mut d_q_block, rows * d);
                    let dq_dst = ViewMut::dense(dq, rows, d);
                    product(dq_dst, Into::Overwrite, d_s, keys.first_rows(n_keys));
                    let dk_dst = ViewMut::dense(&mut dk_rows[..n_keys * d], n_keys, d);
                    product(dk_dst, Into::Add, d_s.t(), q);
                    for (row, dq) in dq.chunks_exact(d).enumerate() {
                        // SAFETY: tasks own disjoint (tokens of a tree) x (columns of a head).
                        let out = unsafe { d_q.slice(start + row * q_width, d) };
                        out.copy_from_slice(dq);
                    }
                }
            }
            for (row, token) in ranges.into_iter().flatten().enumerate() {
                for (shared, rows) in [(d_k, &dk_rows), (d_v, &dv_rows)] {
                    // SAFETY: as above; segments of one tree run one after another.
                    let out = unsafe { shared.slice(token * kv_width + g * d, d) };
                    for (out, v) in out.iter_mut().zip(&rows[row * d..]) {
                        *out += v;
                    }
                }
            }
        }
    }
}

fn product(dst: ViewMut<'_>, mode: Into, lhs: View<'_>, rhs: View<'_>) {
    kernel::matmul(dst, mode, 1.0, lhs, rhs, Threads::One);
}

/// Turns probabilities into score gradients: `p * (dp - <p, dp>) * scale`, row by row.
fn softmax_backward(p: &mut [f32], d_p: &[f32], keys: usize, scale: f32) {
    kernel::simd(|| {
        for (p, d_p) in p.chunks_exact_mut(keys).zip(d_p.chunks_exact(keys)) {
            let mean = kernel::dot(p, d_p);
            for (p, d_p) in p.iter_mut().zip(d_p) {
                *p *= (d_p - mean) * scale;
            }
        }
    });
}

impl CpuOp for Attention {
    fn forward(&self, inputs: &[Matrix], tracked: bool) -> (Matrix, Vec<Matrix>) {
        let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
        let (n, d) = (self.segments.tokens(), self.shape.head_dim);
        assert_eq!((q.rows(), q.cols()), (n, self.shape.heads * d), "queries");
        assert_eq!((k.rows(), k.cols()), (n, self.shape.kv_heads * d), "keys");
        assert_eq!((v.rows(), v.cols()), (n, k.cols()), "values");
        let positions = self.segments.positions();
        let q_rotated = self.rotary.rotate(q.values(), positions, false);
        let k_rotated = self.rotary.rotate(k.values(), positions, false);
        let mut out = kernel::buffer(q.rows() * q.cols());
        let shared = SharedMut::new(&mut out);
        self.tasks()
            .into_par_iter()
            .for_each_init(Block::default, |block, (tree, g)| {
                let inputs = [&q_rotated[..], &k_rotated[..], v.values()];
                self.forward_task(tree, g, inputs, shared, block);
            });
        let saved = if tracked {
            vec![
                Matrix::new(q_rotated, q.rows(), q.cols()),
                Matrix::new(k_rotated, k.rows(), k.cols()),
                v.clone(),
            ]
        } else {
            vec![]
        };
        (Matrix::new(out, q.rows(), q.cols()), saved)
    }

    fn backward(&self, saved: Vec<Matrix>, dy: Matrix, _needed: &[bool]) -> Vec<Option<Matrix>> {
        let (q, k, v) = (&saved[0], &saved[1], &saved[2]);
        let n = q.rows();
        let mut d_q = kernel::buffer(n * q.cols());
        let mut d_k = vec![0f32; n * k.cols()];
        let mut d_v = vec![0f32; n * v.cols()];
        let shared = [&mut d_q, &mut d_k, &mut d_v].map(|d| SharedMut::new(d));
        let inputs = [q, k, v, &dy].map(Matrix::values);
        self.tasks()
            .into_par_iter()
            .for_each(|(tree, g)| self.backward_task(tree, g, inputs, shared));
        let positions = self.segments.positions();
        let d_q = self.rotary.rotate(&d_q, positions, true);
        let d_k = self.rotary.rotate(&d_k, positions, true);
        vec![
            Some(Matrix::new(d_q, n, q.cols())),
            Some(Matrix::new(d_k, n, k.cols())),
            Some(Matrix::new(d_v, n, v.cols())),
        ]
    }
}

#[cfg(test)]
mod tests {
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
        let n = 2 * QUERY_BLOCK + 7;
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
        let q = rotary.rotate(&q, segments.positions(), false);
        let k = rotary.rotate(&k, segments.positions(), false);
        for (from, to) in [(0, 4), (4, 5), (5, 11)] {
            let (q, k, v) = (&q[from * 16..to * 16], &k[..to * 8], &v[..to * 8]);
            let part = attend(q, k, v, to, shape(Some(6)));
            check::close(&part, &whole[from * 16..to * 16], 1e-5);
        }
    }
}
