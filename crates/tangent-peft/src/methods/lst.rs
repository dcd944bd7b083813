//! Ladder side-tuning: a narrow transformer beside the frozen layers, which reads their hidden
//! states and computes what the output head reads. Nothing is propagated back through the layers.
//!
//! ```text
//! s = D_0 drop(h_0)
//! for every layer i that is not skipped:
//!     s = mu_i s + (1 - mu_i) D_i h_i        mu_i = sigmoid(alpha_i / T)
//!     s = block_i(s)
//! logits = head(U drop(norm(s)))
//!
//! h_0: (tokens, d) the embedding, h_i: (tokens, d) the output of layer i      s: (tokens, d_s)
//! D: (d_s, d) and U: (d, d_s), both with a bias      alpha_i: (1)      T: gate_temperature, 0.1
//!
//!   h_0 ---> layer 1 ---> h_1 ---> layer 2 ---> h_2 ---> …        frozen, without a graph
//!    |D_0                  |D_1                  |D_2
//!   s ------------------> mix > block_1 ------> mix > block_2 --> norm > U > head
//! ```
//!
//! Blocks are made like the layers of the Llama family: normalization, rotary attention over
//! grouped heads, normalization, SwiGLU. All widths are those of the layers divided by
//! `reduction_factor`: as many heads, each narrower (even, at least 2), `d_s` whole heads. A narrow
//! head turns at every `reduction_factor`-th of the model's rotary frequencies, which are those of
//! a model of its width.
//!
//! Trained: D, U, the gates' alpha and the blocks. At the start alpha is 0, so `mu` is 1/2; D and U
//! are normal of width 0.01 with biases 0, norms 1, and the blocks' matrices normal of width
//! `1/sqrt(d_in)` or cut out of the model's own (`start=fisher`, see `lst/prune.rs`). The output is
//! not the model's before training. Cost: about `1/reduction_factor^2` of the layers' parameters
//! and operations and `(layers + 2) d d_s` for D and U; the layers run forward once, which
//! `--cache-activations` saves from the second time on. Paper: 2206.06522.
//!
//! `final_norm` puts the model's own final normalization between U and the head; the paper has
//! none. `state_type=bf16` rounds the hidden states that are read, in training as in use, and
//! halves what storing them takes. In the paper's encoder-decoders the decoder's side network also
//! attends to the encoder's; there is none here. The authors' code ends with one more gate, between
//! `U s` and the model's last state; here `U s` alone is what the head reads.
//!
//! Files have a format of Tangent's own, `"peft_type": "LST"`: `adapter_config.json` has the
//! settings (see `lst/files.rs`), and `adapter_model.safetensors` the tensors, with the layers'
//! indices in the model:
//!
//! ```text
//! side.embed.{weight, bias}                                  D_0
//! side.layers.I.alpha                                        alpha_I
//! side.layers.I.downsample.{weight, bias}                    D_I
//! side.layers.I.input_layernorm.weight
//! side.layers.I.self_attn.{q_proj, k_proj, v_proj, o_proj}.weight
//! side.layers.I.post_attention_layernorm.weight
//! side.layers.I.mlp.{gate_proj, up_proj, down_proj}.weight
//! side.norm.weight
//! side.upsample.{weight, bias}                               U
//! ```

mod block;
mod files;
mod layout;
mod prune;

use std::sync::{Arc, RwLock};

use burn::tensor::{Tensor, activation};
use tangent_model::family::Model;
use tangent_model::whole::SideAttend;
use tangent_model::{Parameter, Pass, SideAdapter, StateType};
use tangent_ops::{AttentionShape, Rotary};

use super::affine::Affine;
use super::{Attach, Common, Method, PeftType, Side, cost};
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::peft_format;
use crate::setting::{Setting, SettingValue};
use block::{Block, map};
use layout::Layout;

const REDUCTION_FACTOR: &str = "reduction_factor";
const SKIP_LAYERS: &str = "skip_layers";
const GATE_TEMPERATURE: &str = "gate_temperature";
const FINAL_NORM: &str = "final_norm";
const STATE_TYPE: &str = "state_type";
const START: &str = "start";
const FISHER_ROWS: &str = "fisher_rows";

/// Epsilon of the side network's normalizations, that of T5, with which the paper works.
const EPS: f32 = 1e-6;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "lst",
    summary: "a narrow network beside the frozen layers, which run without gradients",
    paper: "2206.06522",
    identity_at_start: false,
    whole_model: false,
    rank: 1,
    reads: &[Common::Dropout],
    settings: &[
        Setting {
            name: REDUCTION_FACTOR,
            default: SettingValue::Number(8.0),
            summary: "by which the layers' widths are divided",
        },
        Setting {
            name: SKIP_LAYERS,
            default: SettingValue::text("none"),
            summary: "layers without a block: none, as 0,4,8, or every=K for blocks at every K-th",
        },
        Setting {
            name: GATE_TEMPERATURE,
            default: SettingValue::Number(0.1),
            summary: "T in the gates sigmoid(alpha / T)",
        },
        Setting {
            name: FINAL_NORM,
            default: SettingValue::Flag(false),
            summary: "whether the model's final normalization comes before the head",
        },
        Setting {
            name: STATE_TYPE,
            default: SettingValue::text("f32"),
            summary: "to what the hidden states that are read are rounded: f32, bf16",
        },
        Setting {
            name: START,
            default: SettingValue::text("random"),
            summary: "start values of the blocks: random, fisher (cut out of the model's layers)",
        },
        Setting {
            name: FISHER_ROWS,
            default: SettingValue::Number(1024.0),
            summary: "rows of training data that start=fisher looks at",
        },
    ],
    attach: Attach::Side(Side {
        attach,
        setting: START,
        rows_setting: FISHER_ROWS,
        rows: prune::rows,
        values: prune::values,
    }),
    targets: &[],
    cost: cost::nothing,
    control: None,
    peft: Some(PeftType {
        name: "LST",
        of_modules: false,
        known_to_peft: false,
        keys: files::KEYS,
        claims: |_| true,
        read: files::read,
        write: files::write,
        tensors: peft_format::tensors,
    }),
};

/// Name of the tensors of layer `index`.
fn of_layer(index: usize, name: &str) -> String {
    format!("side.layers.{index}.{name}")
}

fn attach(
    config: &AdapterConfig,
    model: &dyn Model,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn SideAdapter>, PeftError> {
    let layout = Layout::of(config, model)?;
    let computed = scope.has_values() || scope.from_file();
    if prune::rows(config)?.is_some() && !computed {
        return Err(PeftError::NoEvidence {
            site: "side".to_owned(),
            init: prune::FISHER,
            needs: "gradients",
        });
    }
    let (width, outer) = (layout.width, layout.outer);
    let rungs = layout.layers.iter().map(|&index| Rung {
        state: index + 1,
        alpha: scope.named(&of_layer(index, "alpha"), vec![1], |_| vec![0.0]),
        downsample: map(&of_layer(index, "downsample"), (width, outer), scope),
        block: Block::new(index, &layout, scope),
    });
    let rungs = rungs.collect();
    Ok(Arc::new(Ladder {
        embed: map("side.embed", (width, outer), scope),
        rungs,
        norm: scope.named("side.norm.weight", vec![width], |_| vec![1.0; width]),
        upsample: map("side.upsample", (outer, width), scope),
        temperature: layout::temperature(config)?,
        dropout: config.dropout,
        state_type: layout::state_type(config)?,
        final_norm: config.own(FINAL_NORM).is_set(),
        attention: layout.attention,
        rotary: RwLock::new(Arc::new(Rotary::new(layout.frequencies, 256))),
    }))
}

/// What belongs to one layer.
struct Rung {
    /// Index of the hidden state that it reads.
    state: usize,
    alpha: Parameter,
    downsample: Affine,
    block: Block,
}

/// The side network.
struct Ladder {
    embed: Affine,
    rungs: Vec<Rung>,
    norm: Parameter,
    upsample: Affine,
    temperature: f32,
    dropout: f32,
    state_type: StateType,
    final_norm: bool,
    attention: AttentionShape,
    rotary: RwLock<Arc<Rotary>>,
}

impl Ladder {
    /// A hidden state as it is read.
    fn read(&self, state: Tensor<2>) -> Tensor<2> {
        match self.state_type {
            StateType::F32 => state,
            StateType::Bf16 => rounded(state),
        }
    }

    fn dropped(&self, x: Tensor<2>, name: &str, pass: &Pass) -> Tensor<2> {
        match pass.training && self.dropout > 0.0 {
            true => tangent_ops::dropout(x, self.dropout, pass.at(name).key),
            false => x,
        }
    }
}

/// The values rounded to bf16.
fn rounded(x: Tensor<2>) -> Tensor<2> {
    let [rows, cols] = x.dims();
    let device = x.device().without_autodiff();
    let mut values = tangent_ops::values(x);
    for v in &mut values {
        *v = half::bf16::from_f32(*v).to_f32();
    }
    tangent_ops::tensor(values, rows, cols, &device)
}

impl Rung {
    /// `mu s + (1 - mu) D h`.
    fn mixed(&self, s: Tensor<2>, h: Tensor<2>, temperature: f32, pass: &Pass) -> Tensor<2> {
        let [_, width] = s.dims();
        let gate = activation::sigmoid(pass.value(&self.alpha) / temperature);
        // The gate as a row: a sum over tokens and features at once, as its gradient would be,
        // depends on threads.
        let ones = Tensor::ones([width, 1], &pass.device);
        let gate = tangent_ops::linear(gate, ones);
        let other = -gate.clone() + 1.0;
        s * gate + self.downsample.of(h, pass) * other
    }
}

impl SideAdapter for Ladder {
    fn blocks(&self) -> usize {
        self.rungs.len()
    }

    fn attention_shape(&self) -> AttentionShape {
        self.attention
    }

    fn rotary(&self, positions: usize) -> Arc<Rotary> {
        let table = self.rotary.read().unwrap_or_else(|e| e.into_inner());
        if table.positions() >= positions {
            return table.clone();
        }
        let longer = Arc::new(table.extended(positions.next_power_of_two()));
        drop(table);
        *self.rotary.write().unwrap_or_else(|e| e.into_inner()) = longer.clone();
        longer
    }

    fn reads(&self, state: usize) -> bool {
        state == 0 || self.rungs.iter().any(|rung| rung.state == state)
    }

    fn state_type(&self) -> StateType {
        self.state_type
    }

    fn hidden(
        &self,
        states: &mut dyn Iterator<Item = Tensor<2>>,
        attend: &mut SideAttend<'_>,
        pass: &Pass,
    ) -> Tensor<2> {
        let Some(embedded) = states.next() else {
            unreachable!("the embedding is among the states that are read")
        };
        let embedded = self.dropped(self.read(embedded), "side.embed", pass);
        let mut s = self.embed.of(embedded, pass);
        for (index, (rung, state)) in self.rungs.iter().zip(states).enumerate() {
            s = rung.mixed(s, self.read(state), self.temperature, pass);
            let mut attend = |q, k, v| attend(index, q, k, v);
            s = rung.block.of(s, &mut attend, pass);
        }
        let s = tangent_ops::rms_norm(s, pass.value(&self.norm), EPS);
        let s = self.dropped(s, "side.upsample", pass);
        self.upsample.of(s, pass)
    }

    fn normalized_by_model(&self) -> bool {
        self.final_norm
    }

    fn kept(&self) -> usize {
        let (width, outer) = (self.norm.count(), self.upsample.bias.count());
        // Of each rung also the stream before it and its layer's output, made narrow; at the end the
        // stream and its normalized form.
        let rungs = self.rungs.iter().map(|rung| 2 * width + rung.block.kept());
        (1 + self.rungs.len()) * outer + rungs.sum::<usize>() + 2 * width
    }

    fn widest(&self) -> usize {
        let blocks = self.rungs.iter().map(|rung| rung.block.widest());
        blocks.max().unwrap_or(0).max(self.norm.count())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn parameter(name: &str, shape: &[usize], values: &[f32]) -> Parameter {
        Parameter::new(name, shape.to_vec(), values.to_vec(), &Device::flex())
    }

    fn affine(weight: &[f32], rows: usize, cols: usize, bias: &[f32]) -> Affine {
        Affine {
            weight: parameter("weight", &[rows, cols], weight),
            bias: parameter("bias", &[rows], bias),
        }
    }

    fn rung(alpha: f32) -> Rung {
        let none = |name: &str, rows: usize, cols: usize| {
            parameter(name, &[rows, cols], &vec![0.0; rows * cols])
        };
        let norm = |name: &str| parameter(name, &[2], &[1.0, 1.0]);
        Rung {
            state: 1,
            alpha: parameter("alpha", &[1], &[alpha]),
            downsample: affine(&[1.0, 0.0, 0.0, 2.0], 2, 2, &[0.0, 10.0]),
            block: Block {
                input_layernorm: norm("input_layernorm"),
                q_proj: none("q", 2, 2),
                k_proj: none("k", 2, 2),
                v_proj: none("v", 2, 2),
                o_proj: none("o", 2, 2),
                post_attention_layernorm: norm("post_attention_layernorm"),
                gate_proj: none("gate", 3, 2),
                up_proj: none("up", 3, 2),
                down_proj: none("down", 2, 3),
            },
        }
    }

    #[test]
    fn a_gate_mixes_the_side_stream_and_the_layer() {
        let device = Device::flex();
        let pass = Pass::inference(&device);
        let row = |values: [f32; 2]| tangent_ops::tensor(values.to_vec(), 1, 2, &device);
        let mixed = |alpha: f32| {
            let mixed = rung(alpha).mixed(row([4.0, 6.0]), row([2.0, 3.0]), 0.1, &pass);
            tangent_ops::values(mixed)
        };
        // D h = (2, 16); at the start mu is a half.
        assert_eq!(mixed(0.0), [3.0, 11.0]);
        // sigmoid(0.1 / 0.1) = 0.7310586.
        let got = mixed(0.1);
        assert!((got[0] - (2.0 + 2.0 * 0.731_058_6)).abs() < 1e-6, "{got:?}");
        assert_eq!(mixed(100.0), [4.0, 6.0]);
        assert_eq!(mixed(-100.0), [2.0, 16.0]);
    }

    #[test]
    fn without_the_blocks_and_the_way_down_the_output_is_the_bias_of_the_way_up() {
        let mut rung = rung(0.0);
        rung.downsample = affine(&[0.0; 4], 2, 2, &[0.0; 2]);
        let ladder = Ladder {
            embed: affine(&[0.0; 4], 2, 2, &[0.0; 2]),
            rungs: vec![rung],
            norm: parameter("norm", &[2], &[1.0, 1.0]),
            upsample: affine(&[5.0, 6.0, 7.0, 8.0], 2, 2, &[0.25, -3.0]),
            temperature: 0.1,
            dropout: 0.0,
            state_type: StateType::F32,
            final_norm: false,
            attention: AttentionShape {
                heads: 1,
                kv_heads: 1,
                head_dim: 2,
                window: None,
            },
            rotary: RwLock::new(Arc::new(Rotary::new(vec![1.0], 4))),
        };
        let device = Device::flex();
        let pass = Pass::inference(&device);
        let state = tangent_ops::tensor(vec![1.0, -2.0], 1, 2, &device);
        let mut attend = |_: usize, _: Tensor<2>, _: Tensor<2>, v: Tensor<2>| v;
        let mut states = [state.clone(), state].into_iter();
        let hidden = ladder.hidden(&mut states, &mut attend, &pass);
        assert_eq!(tangent_ops::values(hidden), [0.25, -3.0]);
        // Two states; the stream and the layer's output, the stream and its normalized form before
        // attention and before the feed-forward; queries, keys, values and attention's results; three
        // activations of the feed-forward; the last stream and its normalized form.
        assert_eq!(ladder.kept(), 2 * 2 + (2 + 4) * 2 + 4 * 2 + 3 * 3 + 2 * 2);
        assert_eq!(ladder.widest(), 3);
        assert_eq!(ladder.rotary(9).positions(), 16);
        assert_eq!(
            [0, 1, 2].map(|state| ladder.reads(state)),
            [true, true, false]
        );
    }

    #[test]
    fn rounding_twice_is_rounding_once() {
        let device = Device::flex();
        let x = tangent_ops::tensor(vec![1.0, 1.004, -3.3], 1, 3, &device);
        let once = rounded(x);
        let values = tangent_ops::values(once.clone());
        assert_eq!(values, [1.0, 1.007_812_5, -3.296_875]);
        assert_eq!(tangent_ops::values(rounded(once)), values);
    }
}
