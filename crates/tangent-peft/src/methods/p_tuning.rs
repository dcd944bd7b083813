//! P-tuning: embeddings of virtual tokens out of a trained encoder.
//!
//! ```text
//! MLP    P = relu(relu(E V_0^T + b_0) V_2^T + b_2) V_4^T + b_4
//! LSTM   P = relu(H V_0^T + b_0) V_2^T + b_2        H = LSTM_2(LSTM_1(E))
//!
//! each LSTM reads its rows x_t forward and backward, h_t of both side by side:
//!        i, f, g, o = W_ih x_t + b_ih + W_hh h_(t-1) + b_hh
//!        c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)
//!
//! E, P: (n, d)      MLP: V_0 (h, d), V_2 (h, h), V_4 (d, h)
//! LSTM: W_ih (4h, d) and (4h, 2h), W_hh (4h, h), V_0 (2h, 2h), V_2 (d, 2h)
//! ```
//!
//! P stands before every row as in prompt tuning. E and the encoder train; the encoder makes
//! virtual tokens move together. An adapter's file holds P alone, so one that is read trains P.
//! Checkpoints hold what trains. The start values are PyTorch's: E ~ N(0, 1), all else uniform in
//! +-1/sqrt(inputs), of an LSTM in +-1/sqrt(h). Cost: the encoder once a micro-batch, n more tokens
//! in each. Paper: 2103.10385, which has the LSTM; PEFT has both, the MLP unless told otherwise.

use std::sync::Arc;

use burn::tensor::{Tensor, activation};
use serde_json::{Map, Value, json};
use tangent_model::family::Model;
use tangent_model::{Parameter, Pass, PrefixAdapter};

use super::affine::Affine;
use super::virtual_tokens::{
    self, COUNT, COUNT_SETTING, ENCODER_WIDTH, Embeddings, Fill, HEADS, LAYERS, MODULES, TABLE,
    Tensors, WIDTH, count, encoded_table, encoder_width, linear, new_tensors, saved, set,
    tensors_of, written,
};
use super::{Attach, Method, PeftType, cost};
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::export::LazyTensor;
use crate::peft_format::Fields;
use crate::setting::{Setting, SettingValue};

const KIND: &str = "encoder_reparameterization_type";
const MLP: &str = "MLP";
const LSTM: &str = "LSTM";

/// Layers of the LSTM, in PEFT and in the paper's code.
const LSTM_LAYERS: usize = 2;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "p-tuning",
    summary: "a small network that gives embeddings of virtual tokens",
    paper: "2103.10385",
    identity_at_start: false,
    whole_model: false,
    rank: 1,
    reads: &[],
    settings: &[
        COUNT_SETTING,
        Setting {
            name: KIND,
            default: SettingValue::text(MLP),
            summary: "the network: MLP, LSTM",
        },
        Setting {
            name: ENCODER_WIDTH,
            default: SettingValue::Number(0.0),
            summary: "its width; 0 is the model's",
        },
    ],
    attach: Attach::Prefix(attach),
    targets: &[],
    cost: cost::nothing,
    control: None,
    peft: Some(PeftType {
        name: "P_TUNING",
        of_modules: false,
        known_to_peft: true,
        keys: &[
            COUNT,
            MODULES,
            HEADS,
            LAYERS,
            WIDTH,
            KIND,
            ENCODER_WIDTH,
            // Of training in PEFT only.
            "encoder_num_layers",
            "encoder_dropout",
        ],
        claims: |_| true,
        read,
        write,
        tensors,
    }),
};

fn attach(
    config: &AdapterConfig,
    model: &dyn Model,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn PrefixAdapter>, PeftError> {
    let (tokens, width) = (count(config, model)?, model.head().weight.cols());
    let kind = Kind::of(config)?;
    let hidden = encoder_width(config, width)?;
    if scope.from_file() {
        let rows = saved(scope, (tokens, width), |_| vec![]);
        return Ok(Arc::new(Embeddings { tokens, rows }));
    }
    let sides = (tokens, width, hidden);
    Ok(Arc::new(Encoder::new(&mut new_tensors(scope), kind, sides)))
}

/// What an encoder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mlp,
    Lstm,
}

impl Kind {
    fn of(config: &AdapterConfig) -> Result<Self, PeftError> {
        let chosen = config.own(KIND);
        match chosen.word().to_ascii_uppercase().as_str() {
            MLP => Ok(Self::Mlp),
            LSTM => Ok(Self::Lstm),
            _ => Err(PeftError::Setting {
                setting: KIND,
                value: chosen.to_string(),
                why: "must be one of MLP, LSTM",
            }),
        }
    }
}

/// The encoder with the table that it reads.
struct Encoder {
    tokens: usize,
    table: Parameter,
    /// The layers of an LSTM, each forward and backward; none of an MLP.
    recurrent: Vec<[Direction; 2]>,
    /// Linear maps with rectifiers between them.
    head: Vec<Affine>,
}

impl Encoder {
    fn new(
        tensors: &mut Tensors<'_>,
        kind: Kind,
        (tokens, width, hidden): (usize, usize, usize),
    ) -> Self {
        let table = tensors(TABLE, vec![tokens, width], Fill::Normal);
        let recurrent = match kind {
            Kind::Mlp => vec![],
            Kind::Lstm => (0..LSTM_LAYERS)
                .map(|layer| {
                    let inputs = if layer == 0 { width } else { 2 * hidden };
                    ["", "_reverse"].map(|direction| {
                        let name = format!("l{layer}{direction}");
                        Direction::new(tensors, &name, inputs, hidden)
                    })
                })
                .collect(),
        };
        let sides = match kind {
            Kind::Mlp => vec![width, hidden, hidden, width],
            Kind::Lstm => vec![2 * hidden, 2 * hidden, width],
        };
        // PyTorch counts the rectifiers too.
        let maps = sides.iter().zip(&sides[1..]).enumerate();
        let head = maps.map(|(index, (d_in, d_out))| {
            linear(tensors, &format!("mlp_head.{}", 2 * index), *d_in, *d_out)
        });
        Self {
            tokens,
            table,
            head: head.collect(),
            recurrent,
        }
    }

    /// The embeddings of the virtual tokens, `(tokens, d)`.
    fn outputs(&self, pass: &Pass) -> Tensor<2> {
        let mut x = pass.value(&self.table);
        for [forward, backward] in &self.recurrent {
            let backward = backward.outputs(x.clone(), true, pass);
            x = Tensor::cat(vec![forward.outputs(x, false, pass), backward], 1);
        }
        for (index, map) in self.head.iter().enumerate() {
            if index > 0 {
                x = activation::relu(x);
            }
            x = map.of(x, pass);
        }
        x
    }
}

impl PrefixAdapter for Encoder {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn embeddings(&self, pass: &Pass) -> Option<Tensor<2>> {
        Some(self.outputs(pass))
    }
}

/// One direction of a layer of an LSTM.
struct Direction {
    of_input: Parameter,
    of_state: Parameter,
    input_bias: Parameter,
    state_bias: Parameter,
}

impl Direction {
    fn new(tensors: &mut Tensors<'_>, name: &str, inputs: usize, hidden: usize) -> Self {
        let fill = Fill::Uniform { inputs: hidden };
        let mut tensor =
            |part: &str, shape| tensors(&format!("lstm_head.{part}_{name}"), shape, fill);
        Self {
            of_input: tensor("weight_ih", vec![4 * hidden, inputs]),
            of_state: tensor("weight_hh", vec![4 * hidden, hidden]),
            input_bias: tensor("bias_ih", vec![4 * hidden]),
            state_bias: tensor("bias_hh", vec![4 * hidden]),
        }
    }

    /// What it gives of the rows of `x: (tokens, inputs)`, read from the last one on if `reversed`,
    /// `(tokens, hidden)` in the order of `x`.
    fn outputs(&self, x: Tensor<2>, reversed: bool, pass: &Pass) -> Tensor<2> {
        let biases = pass.value(&self.input_bias) + pass.value(&self.state_bias);
        let gates = tangent_ops::linear(x, pass.value(&self.of_input)) + biases;
        let [tokens, width] = gates.dims();
        let hidden = width / 4;
        let of_state = pass.value(&self.of_state);
        let mut order: Vec<usize> = (0..tokens).collect();
        if reversed {
            order.reverse();
        }
        let mut outputs = Vec::with_capacity(tokens);
        let mut before: Option<(Tensor<2>, Tensor<2>)> = None;
        for token in order {
            let own = gates.clone().narrow(0, token, 1);
            let all = match &before {
                None => own,
                Some((state, _)) => own + tangent_ops::linear(state.clone(), of_state.clone()),
            };
            let part = |index: usize| all.clone().narrow(1, index * hidden, hidden);
            let [input, forget, output] = [0, 1, 3].map(|index| activation::sigmoid(part(index)));
            let new = input * part(2).tanh();
            let cell = match before {
                None => new,
                Some((_, cell)) => forget * cell + new,
            };
            let state = output * cell.clone().tanh();
            outputs.push(state.clone());
            before = Some((state, cell));
        }
        if reversed {
            outputs.reverse();
        }
        Tensor::cat(outputs, 0)
    }
}

fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    virtual_tokens::read(fields, config)?;
    virtual_tokens::read_width(fields, config)?;
    if let Some(value) = fields.get(KIND) {
        let kind = [MLP, LSTM]
            .into_iter()
            .find(|name| value.as_str() == Some(*name))
            .ok_or_else(|| fields.wrong(KIND, "MLP or LSTM", value))?;
        set(config, KIND, SettingValue::text(kind));
    }
    Ok(())
}

fn write(adapter: &Adapter) -> Map<String, Value> {
    let kind = adapter.config.own(KIND).word().to_ascii_uppercase();
    let mut map = virtual_tokens::write(adapter);
    map.insert(KIND.to_owned(), json!(kind));
    let width = virtual_tokens::written_width(adapter);
    map.insert(ENCODER_WIDTH.to_owned(), width);
    map.insert("encoder_num_layers".to_owned(), json!(LSTM_LAYERS));
    map.insert("encoder_dropout".to_owned(), json!(0.0));
    map
}

fn tensors(adapter: &Adapter) -> Vec<(String, LazyTensor<'_>)> {
    let encoder = encoded_table(adapter).map(|(tokens, width)| {
        let kind = match Kind::of(&adapter.config) {
            Ok(kind) => kind,
            Err(error) => unreachable!("it was attached: {error}"),
        };
        // The tensors are there; their sides are not looked at.
        let encoder = Encoder::new(&mut tensors_of(adapter), kind, (tokens, width, width));
        ([tokens, width], encoder)
    });
    written(
        adapter,
        encoder.map(|(shape, encoder)| (shape, move |pass: &Pass| encoder.outputs(pass))),
    )
}
