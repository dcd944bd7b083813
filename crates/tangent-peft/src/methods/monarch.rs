//! MoRe: a Monarch matrix, two block-diagonal factors around a permutation, beside each frozen
//! weight.
//!
//! ```text
//! y = x W^T + drop(x (M2 P M1)^T)
//!
//! u[b k + j]       = sum_c w1[b][j][c] x[b i + c]      w1: (n, k, i)      i = ceil(d_in / n)
//! (...)[o n + b]   = sum_t w2[b][o][t] u[t n + b]      w2: (n, o, k)      o = ceil(d_out / n)
//!
//! W: (d_out, d_in) frozen      n = nblocks      k = rank
//! ```
//!
//! Trained: both factors, `w1` uniform in +-1/sqrt(i) at the start and `w2` 0, so the model is
//! unchanged. There is no scaling. With as many parameters as LoRA of rank k the change of the
//! weight has a rank of up to `n k`: where n divides k, each of its n^2 blocks, of i inputs and
//! every n-th output, has rank k / n, and no block shares a factor with another. Cost:
//! `k (d_in + d_out)` parameters a site and as many multiply-adds a token. Papers: 2408.17383,
//! 2204.00595 (Monarch).
//!
//! Where n does not divide the inputs or outputs, x goes on with zeros and y is cut, and a block
//! that has no inputs is left out, all as in the authors' code. That keeps more rows of `w2` than
//! there are outputs, which nothing reads; they are not kept here. It also computes in bf16, and
//! stops at a rank of i. Dropout is the authors': of the product's results, not of its inputs.
//!
//! Files: PEFT has no such type. Ours is `"peft_type": "MONARCH"` with `nblocks`, `blk_r` and
//! `dropout`; the tensors `blkdiag1: (n k, i)` and `blkdiag2: (n o, k)` are the authors', block
//! below block. Adapters become LoRA of rank `nblocks * blk_r` exactly.

use std::sync::Arc;

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};
use tangent_model::{Parameter, Pass, Site, Tangent, WeightAdapter};
use tangent_ops::{FrozenMatrix, LowRank, MonarchShape};

use super::cost::{Cost, Input};
use super::{ALL_LINEAR, Attach, Common, Method, PeftType, checked_rank, linear_only};
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::init::{Factors, uniform};
use crate::peft_format::{self, Fields, number, object};
use crate::setting::{Setting, SettingValue};

const BLOCKS: &str = "nblocks";
const RANK: &str = "blk_r";
const DROPOUT: &str = "dropout";

/// The method's entry.
pub const METHOD: Method = Method {
    id: "monarch",
    summary: "two block-diagonal factors around a permutation",
    paper: "2408.17383, 2204.00595",
    identity_at_start: true,
    whole_model: false,
    rank: 4,
    reads: &[Common::Rank, Common::Dropout],
    settings: &[Setting {
        name: BLOCKS,
        default: SettingValue::Number(4.0),
        summary: "blocks of each factor",
    }],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost,
    control: None,
    peft: Some(PeftType {
        name: "MONARCH",
        of_modules: true,
        known_to_peft: false,
        keys: &[BLOCKS, RANK, DROPOUT],
        claims: |_| true,
        read,
        write,
        tensors: peft_format::tensors,
    }),
};

fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let shape = shape_at(config, site)?;
    let ([rows1, cols1], [rows2, cols2]) = (shape.first(), shape.second());
    Ok(Cost {
        // With dropout the products are made one by one, of an input that is there.
        input: match config.dropout > 0.0 {
            true => Input::Kept,
            false => Input::FormedAgain,
        },
        per_token: rows1,
        trained_work: rows1 * cols1 + rows2 * cols2,
        ..Cost::NOTHING
    })
}

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    let shape = shape_at(config, site)?;
    let ([rows1, cols1], [rows2, cols2]) = (shape.first(), shape.second());
    Ok(Arc::new(Monarch {
        w1: scope.parameter(site, "blkdiag1", vec![rows1, cols1], |rng| {
            uniform(rng, rows1 * cols1, cols1)
        }),
        w2: scope.parameter(site, "blkdiag2", vec![rows2, cols2], |_| {
            vec![0.0; rows2 * cols2]
        }),
        shape,
        dropout: config.dropout,
    }))
}

/// How the factors of a site are cut into blocks, which need as many inputs and outputs.
fn shape_at(config: &AdapterConfig, site: &Site) -> Result<MonarchShape, PeftError> {
    linear_only(METHOD.id, site)?;
    let rank = checked_rank(config, site)?;
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let blocks = config.whole(BLOCKS, 1, "must be a whole number of at least 1")?;
    if blocks > rows.min(cols) {
        return Err(PeftError::Setting {
            setting: BLOCKS,
            value: format!("{blocks} at {}, {rows} x {cols}", site.path),
            why: "must be at most the smaller side of every adapted weight",
        });
    }
    Ok(MonarchShape::new(cols, rows, blocks, rank))
}

struct Monarch {
    /// First factor, block below block.
    w1: Parameter,
    /// Second factor, block below block.
    w2: Parameter,
    shape: MonarchShape,
    /// Probability of dropping a result in training.
    dropout: f32,
}

impl Monarch {
    fn factors(&self, pass: &Pass) -> (Tensor<2>, Tensor<2>) {
        (pass.value(&self.w1), pass.value(&self.w2))
    }

    fn drops(&self, pass: &Pass) -> bool {
        pass.training && self.dropout > 0.0
    }
}

impl WeightAdapter for Monarch {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let (w1, w2) = self.factors(pass);
        let unit: Tensor<2> = Tensor::eye(self.shape.inputs(), &pass.device);
        let columns = tangent_ops::monarch::definition(unit, w1, w2, self.shape);
        base + columns.transpose()
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let (w1, w2) = self.factors(pass);
        if self.drops(pass) {
            let delta = tangent_ops::monarch(x.clone(), w1, w2, self.shape);
            return tangent_ops::frozen_linear(x, base)
                + tangent_ops::dropout(delta, self.dropout, pass.key);
        }
        tangent_ops::monarch_linear(x, base, w1, w2, self.shape)
    }

    fn gated_linear(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        base: &FrozenMatrix,
        pass: &Pass,
    ) -> Tensor<2> {
        if self.drops(pass) {
            return self.linear(tangent_ops::swiglu(gate, up), base, pass);
        }
        let (w1, w2) = self.factors(pass);
        tangent_ops::gated_monarch_linear(gate, up, base, w1, w2, self.shape)
    }

    fn is_additive(&self) -> bool {
        true
    }

    fn tangent(&self) -> Option<Tangent<'_>> {
        Some(Tangent::Monarch {
            first: &self.w1,
            second: &self.w2,
            shape: self.shape,
        })
    }

    fn low_rank(&self, pass: &Pass) -> Option<LowRank> {
        let (rows, cols) = (self.shape.outputs(), self.shape.inputs());
        let (rank, Factors { a, b }) =
            lora_factors(self.shape, &self.w1.values(), &self.w2.values());
        Some(LowRank {
            b: tangent_ops::tensor(b, rows, rank, &pass.device),
            a: tangent_ops::tensor(a, rank, cols, &pass.device),
            scaling: 1.0,
        })
    }
}

/// LoRA's factors of the same change of a weight, with a scaling of 1, from row-major `w1` and `w2`
/// as a file has them, and their rank: `blocks * rank`, at most the smaller side of the weight. The
/// values are those of the factors, each in its place; where the smaller side is the rank, one
/// factor is the change itself and the other leaves it as it is.
fn lora_factors(shape: MonarchShape, w1: &[f32], w2: &[f32]) -> (usize, Factors) {
    let ([between, width], [height, rank]) = (shape.first(), shape.second());
    debug_assert_eq!((w1.len(), w2.len()), (between * width, height * rank));
    let (rows, cols) = (shape.outputs(), shape.inputs());
    let mut a = vec![0.0; between * cols];
    for (f, values) in w1.chunks_exact(width).enumerate() {
        let start = f / rank * width;
        let own = a[f * cols..][..cols].iter_mut().skip(start);
        own.zip(values).for_each(|(a, value)| *a = *value);
    }
    let mut b = vec![0.0; rows * between];
    for (i, b) in b.chunks_exact_mut(between).enumerate() {
        let (o, block) = (i / shape.blocks(), i % shape.blocks());
        let values = &w2[(block * shape.out_block() + o) * rank..][..rank];
        let own = b.iter_mut().skip(block).step_by(shape.blocks());
        own.zip(values).for_each(|(b, value)| *b = *value);
    }
    if between <= rows.min(cols) {
        return (between, Factors { a, b });
    }
    let delta = product(&b, &a, (rows, between, cols));
    let (rank, a, b) = match cols <= rows {
        true => (cols, unit(cols), delta),
        false => (rows, delta, unit(rows)),
    };
    (rank, Factors { a, b })
}

/// Row-major `(rows, inner)` times `(inner, cols)`.
fn product(left: &[f32], right: &[f32], (rows, inner, cols): (usize, usize, usize)) -> Vec<f32> {
    let left = tangent_linalg::mat(left, rows, inner);
    let right = tangent_linalg::mat(right, inner, cols);
    let product = tangent_linalg::product(left.as_ref(), right.as_ref());
    tangent_linalg::to_rows(product.as_ref())
}

/// Ones on the diagonal.
fn unit(size: usize) -> Vec<f32> {
    let mut values = vec![0.0; size * size];
    values
        .iter_mut()
        .step_by(size + 1)
        .for_each(|value| *value = 1.0);
    values
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    let count = |key: &str| fields.get(key).map(|v| fields.count(key, v)).transpose();
    config.rank = count(RANK)?.unwrap_or(METHOD.rank);
    if let Some(blocks) = count(BLOCKS)? {
        let blocks = SettingValue::Number(blocks as f64);
        config.own.insert(BLOCKS.to_owned(), blocks);
    }
    config.dropout = fields.number(DROPOUT)?.unwrap_or(0.0);
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    object(json!({
        "blk_r": config.rank,
        "dropout": number(config.dropout),
        "nblocks": config.own(BLOCKS).whole(),
    }))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// Factors whose numbers are whole and small, so that every sum is exact.
    fn monarch(inputs: usize, outputs: usize, blocks: usize, rank: usize) -> Monarch {
        let device = Device::flex();
        let shape = MonarchShape::new(inputs, outputs, blocks, rank);
        let parameter = |[rows, cols]: [usize; 2], step: usize| {
            let values = (0..rows * cols)
                .map(|i| (i * step % 7) as f32 - 3.0)
                .collect();
            Parameter::new("factor", vec![rows, cols], values, &device)
        };
        Monarch {
            w1: parameter(shape.first(), 3),
            w2: parameter(shape.second(), 5),
            shape,
            dropout: 0.0,
        }
    }

    fn delta(monarch: &Monarch) -> Vec<f32> {
        let device = Device::flex();
        let base = Tensor::zeros([monarch.shape.outputs(), monarch.shape.inputs()], &device);
        tangent_ops::values(monarch.weight(base, &Pass::inference(&device)))
    }

    #[test]
    fn a_known_weight() {
        let device = Device::flex();
        let parameter = |values: &[f32], rows: usize, cols: usize| {
            Parameter::new("factor", vec![rows, cols], values.to_vec(), &device)
        };
        // u = (x0, 2 x1, 3 x2, 4 x3); the outputs 0 and 2 see u0 and u2, the others u1 and u3.
        let monarch = Monarch {
            w1: parameter(&[1.0, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0], 4, 2),
            w2: parameter(&[1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 5.0, 0.0], 4, 2),
            shape: MonarchShape::new(4, 4, 2, 2),
            dropout: 0.0,
        };
        let want = [
            [1.0, 0.0, 0.0, 0.0],
            [0.0, 2.0, 0.0, 4.0],
            [0.0, 0.0, 3.0, 0.0],
            [0.0, 10.0, 0.0, 0.0],
        ];
        assert_eq!(delta(&monarch), want.as_flattened());
    }

    #[test]
    fn lora_of_all_blocks_ranks_is_the_same_change() {
        for (inputs, outputs, blocks, rank, want) in [
            (16, 12, 4, 2, 8),
            (10, 14, 3, 3, 9),
            // No more than the smaller side, whichever it is.
            (8, 12, 4, 4, 8),
            (12, 8, 4, 4, 8),
            (9, 7, 4, 2, 6),
        ] {
            let monarch = monarch(inputs, outputs, blocks, rank);
            let (w1, w2) = (monarch.w1.values(), monarch.w2.values());
            let (rank, Factors { a, b }) = lora_factors(monarch.shape, &w1, &w2);
            assert_eq!(rank, want);
            assert_eq!((a.len(), b.len()), (rank * inputs, outputs * rank));
            let got = product(&b, &a, (outputs, rank, inputs));
            assert_eq!(got, delta(&monarch), "{inputs} {outputs} {blocks}");
        }
    }

    #[test]
    fn dropout_is_of_the_results() {
        let device = Device::flex();
        let monarch = Monarch {
            dropout: 0.5,
            ..monarch(8, 12, 4, 4)
        };
        let base = FrozenMatrix::from_values(vec![0.0; 12 * 8], 12, 8);
        let x: Vec<f32> = (0..5 * 8).map(|i| (i * 4 % 9) as f32 - 4.0).collect();
        let x = tangent_ops::tensor(x, 5, 8, &device);
        let pass = Pass {
            tracked: false,
            ..Pass::training(&device, 3)
        };
        let kept = monarch.linear(x.clone(), &base, &Pass::inference(&device));
        let got = monarch.linear(x, &base, &pass);
        let want = tangent_ops::dropout(kept.clone(), 0.5, 3);
        let (got, want) = (tangent_ops::values(got), tangent_ops::values(want));
        assert_eq!(got, want);
        assert_ne!(got, tangent_ops::values(kept));
    }
}
