//! What adapters of sub-layers share: two trained linear maps around an activation, their settings
//! and their files.
//!
//! ```text
//! b(x) = W2 act(W1 x + b1) + b2        W1: (m, d)    b1: (m)    W2: (d, m)    b2: (d)
//! ```
//!
//! m is `bottleneck_size`, or d over `reduction_factor`, rounded down and at least 1; whichever is
//! given counts. At the start W1 is uniform in +-1/sqrt(d) and all else 0, so that b is 0 exactly;
//! `start=normal` draws both matrices as the method's authors did, which is near 0 only. Cost:
//! `2 m d + m + d` parameters and about as many multiply-adds a token.
//!
//! Files: PEFT has no such types. Ours are named after the method (`"peft_type": "HOULSBY"`), with
//! `bottleneck_size` and `reduction_factor`, one of which is 0, and `non_linearity`. Tensors stand
//! below the path of the sub-layer: `adapter_down.weight`, `adapter_down.bias`,
//! `adapter_up.weight`, `adapter_up.bias`.

use burn::tensor::{Tensor, activation};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tangent_model::{Pass, Sublayer};

use super::PeftType;
use super::affine::Affine;
use crate::adapter::{Adapter, Scope};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::init::{self, uniform};
use crate::peft_format::{self, Fields, object};
use crate::setting::{Setting, SettingValue};

pub(super) const SIZE: &str = "bottleneck_size";
pub(super) const FACTOR: &str = "reduction_factor";
pub(super) const ACTIVATION: &str = "non_linearity";
const START: &str = "start";
const ZERO: &str = "zero";
const NORMAL: &str = "normal";

/// Hidden units at most.
const LARGEST: usize = 65_536;

/// The setting of the hidden units; 0 leaves them to the factor.
pub(super) const fn size_setting(default: f64) -> Setting {
    Setting {
        name: SIZE,
        default: SettingValue::Number(default),
        summary: "hidden units of each adapter; 0: reduction_factor decides",
    }
}

/// The setting of the factor; 0 leaves the hidden units to their own.
pub(super) const fn factor_setting(default: f64) -> Setting {
    Setting {
        name: FACTOR,
        default: SettingValue::Number(default),
        summary: "the model's width over the hidden units; 0: bottleneck_size decides",
    }
}

/// The setting of the activation.
pub(super) const fn activation_setting(default: &'static str) -> Setting {
    Setting {
        name: ACTIVATION,
        default: SettingValue::text(default),
        summary: "relu, gelu, swish or tanh",
    }
}

/// The setting of the start values.
pub(super) const START_SETTING: Setting = Setting {
    name: START,
    default: SettingValue::text(ZERO),
    summary: "zero: an exact identity; normal: the authors' small random numbers",
};

/// Normal numbers, as the authors of a method draw both matrices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Normal {
    /// Standard deviation.
    pub deviation: f64,
    /// Whether numbers beyond two deviations are drawn again.
    pub cut_off: bool,
}

impl Normal {
    fn values(self, rng: &mut impl Rng, count: usize) -> Vec<f32> {
        let mut number = || loop {
            let drawn = init::normal(rng);
            if !self.cut_off || drawn.abs() <= 2.0 {
                break (drawn * self.deviation) as f32;
            }
        };
        (0..count).map(|_| number()).collect()
    }
}

/// The authors' numbers if the setting asks for them.
fn start(config: &AdapterConfig, authors: Option<Normal>) -> Result<Option<Normal>, PeftError> {
    let Some(authors) = authors else {
        return Ok(None);
    };
    let value = config.own(START);
    match value.word() {
        ZERO => Ok(None),
        NORMAL => Ok(Some(authors)),
        other => Err(PeftError::Setting {
            setting: START,
            value: other.to_owned(),
            why: "must be zero or normal",
        }),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activation {
    Relu,
    Gelu,
    Swish,
    Tanh,
}

const ACTIVATIONS: &[(&str, Activation)] = &[
    ("relu", Activation::Relu),
    ("gelu", Activation::Gelu),
    ("swish", Activation::Swish),
    ("tanh", Activation::Tanh),
];

impl Activation {
    fn of_setting(config: &AdapterConfig) -> Result<Self, PeftError> {
        let value = config.own(ACTIVATION);
        let named = ACTIVATIONS.iter().find(|(name, _)| *name == value.word());
        let fault = || PeftError::Setting {
            setting: ACTIVATION,
            value: value.to_string(),
            why: "must be relu, gelu, swish or tanh",
        };
        named.map(|(_, activation)| *activation).ok_or_else(fault)
    }

    fn of(self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Relu => activation::relu(x),
            Self::Gelu => activation::gelu(x),
            Self::Swish => activation::silu(x),
            Self::Tanh => activation::tanh(x),
        }
    }

    /// Values of a hidden unit that are kept: what it is given, what the next map takes, and
    /// swish's factor.
    fn kept(self) -> usize {
        match self {
            Self::Swish => 3,
            Self::Relu | Self::Gelu | Self::Tanh => 2,
        }
    }
}

/// `bottleneck_size` and `reduction_factor`: the one that is given, and 0 for the other; both are 0
/// where both are given, which [`units`] refuses.
fn measures(config: &AdapterConfig) -> [SettingValue; 2] {
    let given = |name: &str| config.own.get(name).is_some_and(|v| v.number() != 0.0);
    let unless = |name: &str, other: &str| match given(other) {
        true => SettingValue::Number(0.0),
        false => config.own(name),
    };
    [unless(SIZE, FACTOR), unless(FACTOR, SIZE)]
}

/// Hidden units beside a sub-layer of `width` features.
fn units(config: &AdapterConfig, width: usize) -> Result<usize, PeftError> {
    let [size, factor] = measures(config);
    let factor = factor.number();
    // The one that decides, or should.
    let typed = |name: &str| config.own.contains_key(name);
    let by_factor = size.whole() == Some(0) && (factor != 0.0 || (typed(FACTOR) && !typed(SIZE)));
    let decides = match by_factor {
        true => FACTOR,
        false => SIZE,
    };
    let fault = |why| PeftError::Setting {
        setting: decides,
        value: config.own(decides).to_string(),
        why,
    };
    let units = match size.whole() {
        Some(0) if factor > 0.0 => (width as f64 / factor).max(1.0) as usize,
        Some(n) if n > 0 && factor == 0.0 => n as usize,
        _ if by_factor => return Err(fault("give a number above 0")),
        _ => {
            return Err(fault(
                "give a whole number, or reduction_factor, not both; above 0",
            ));
        }
    };
    match units <= LARGEST {
        true => Ok(units),
        false => Err(fault("must come to at most 65536 hidden units")),
    }
}

/// Two linear maps around an activation.
pub(super) struct Bottleneck {
    down: Affine,
    up: Affine,
    activation: Activation,
    /// Features that go in and come out.
    pub width: usize,
    units: usize,
    /// Probability of dropping a hidden unit in training.
    dropout: f32,
}

impl Bottleneck {
    /// Creates the tensors of one sub-layer; `authors` are the numbers of `start=normal`, if the
    /// method has that setting.
    ///
    /// # Errors
    /// If a setting is out of its range.
    pub fn new(
        config: &AdapterConfig,
        sublayer: &Sublayer,
        scope: &mut Scope<'_>,
        authors: Option<Normal>,
    ) -> Result<Self, PeftError> {
        let (width, units) = (sublayer.width, units(config, sublayer.width)?);
        let normal = start(config, authors)?;
        let name = |part: &str| format!("{}.adapter_{part}", sublayer.path);
        let activation = Activation::of_setting(config)?;
        let down = |rng: &mut ChaCha8Rng| match normal {
            None => uniform(rng, units * width, width),
            Some(normal) => normal.values(rng, units * width),
        };
        let up = |rng: &mut ChaCha8Rng| match normal {
            None => vec![0.0; width * units],
            Some(normal) => normal.values(rng, width * units),
        };
        Ok(Self {
            down: Affine::new(scope, &name("down"), (units, width), down),
            up: Affine::new(scope, &name("up"), (width, units), up),
            activation,
            width,
            units,
            dropout: config.dropout,
        })
    }

    /// `W2 act(W1 x + b1) + b2` of `x: (tokens, width)`.
    pub fn of(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let hidden = self.activation.of(self.down.of(x, pass));
        let hidden = match pass.training && self.dropout > 0.0 {
            true => tangent_ops::dropout(hidden, self.dropout, pass.key),
            false => hidden,
        };
        self.up.of(hidden, pass)
    }

    /// Values of a token that are kept for the derivative, the input among them.
    pub fn kept(&self) -> usize {
        self.width + self.units * self.activation.kept()
    }
}

/// Files of a method that has these settings alone, in a format of our own.
pub(super) const fn file_type(name: &'static str) -> PeftType {
    PeftType {
        name,
        of_modules: true,
        known_to_peft: false,
        keys: &[SIZE, FACTOR, ACTIVATION],
        claims: |_| true,
        read,
        write,
        tensors: peft_format::tensors,
    }
}

/// Reads what all methods of a bottleneck have.
///
/// # Errors
/// If a value is of another type.
pub(super) fn read(fields: &Fields<'_>, config: &mut AdapterConfig) -> Result<(), PeftError> {
    let mut set = |name: &str, value| config.own.insert(name.to_owned(), value);
    if let Some(size) = fields.get(SIZE) {
        let size = fields.index(SIZE, size)?;
        set(SIZE, SettingValue::Number(size.into()));
    }
    if let Some(value) = fields.get(FACTOR) {
        let wrong = || fields.wrong(FACTOR, "a number", value);
        let factor = value.as_f64().ok_or_else(wrong)?;
        set(FACTOR, SettingValue::Number(factor));
    }
    if let Some(value) = fields.get(ACTIVATION) {
        let wrong = || fields.wrong(ACTIVATION, "a word", value);
        let word = value.as_str().ok_or_else(wrong)?.to_owned();
        set(ACTIVATION, SettingValue::Text(word.into()));
    }
    Ok(())
}

/// Writes it.
pub(super) fn write(adapter: &Adapter) -> Map<String, Value> {
    let config = &adapter.config;
    let [size, factor] = measures(config);
    object(json!({
        SIZE: size.whole(),
        FACTOR: factor.number(),
        ACTIVATION: config.own(ACTIVATION).word(),
    }))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use rand::SeedableRng;
    use tangent_model::Parameter;

    use super::*;

    fn config(method: &str, own: &[(&str, f64)]) -> AdapterConfig {
        let own = own.iter();
        AdapterConfig {
            method: method.into(),
            own: own
                .map(|(name, n)| ((*name).to_owned(), SettingValue::Number(*n)))
                .collect(),
            ..AdapterConfig::default()
        }
    }

    #[test]
    fn hidden_units_are_given_or_follow_from_the_factor() {
        for (method, own, want) in [
            ("houlsby", vec![], Some(64)),
            ("houlsby", vec![(FACTOR, 16.0)], Some(6)),
            ("houlsby", vec![(SIZE, 0.0), (FACTOR, 200.0)], Some(1)),
            ("pfeiffer", vec![], Some(6)),
            ("pfeiffer", vec![(SIZE, 5.0)], Some(5)),
            ("pfeiffer", vec![(SIZE, 5.0), (FACTOR, 0.0)], Some(5)),
            ("pfeiffer", vec![(FACTOR, 0.5)], Some(200)),
            ("houlsby", vec![(SIZE, 5.0), (FACTOR, 16.0)], None),
            ("houlsby", vec![(SIZE, 0.0)], None),
            ("houlsby", vec![(SIZE, 2.5)], None),
            ("houlsby", vec![(SIZE, -1.0)], None),
            ("pfeiffer", vec![(FACTOR, -1.0)], None),
            ("pfeiffer", vec![(FACTOR, 1e-9)], None),
        ] {
            let got = units(&config(method, &own), 100);
            assert_eq!(got.ok(), want, "{method} {own:?}");
        }
        let error = units(&config("houlsby", &[(SIZE, -1.0)]), 100).unwrap_err();
        assert!(
            error.to_string().starts_with("bottleneck_size = -1"),
            "{error}"
        );
        for (method, factor, words) in [
            ("houlsby", -1.0, "= -1: give a number"),
            ("houlsby", 1e-9, "65536 hidden units"),
            ("pfeiffer", 0.0, "= 0: give a number"),
        ] {
            let error = units(&config(method, &[(FACTOR, factor)]), 100).unwrap_err();
            let error = error.to_string();
            assert!(error.starts_with("reduction_factor = "), "{error}");
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn the_maps_stand_around_the_activation() {
        let device = Device::flex();
        let parameter = |shape: &[usize], values: &[f32]| {
            Parameter::new("p", shape.to_vec(), values.to_vec(), &device)
        };
        let bottleneck = Bottleneck {
            down: Affine {
                weight: parameter(&[2, 3], &[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]),
                bias: parameter(&[2], &[-1.0, 0.5]),
            },
            up: Affine {
                weight: parameter(&[3, 2], &[1.0, 2.0, 0.0, 1.0, -1.0, 0.0]),
                bias: parameter(&[3], &[0.0, 0.0, 10.0]),
            },
            activation: Activation::Relu,
            width: 3,
            units: 2,
            dropout: 0.5,
        };
        let x = tangent_ops::tensor(vec![1.0, 2.0, 3.0, 0.0, -4.0, 0.0], 2, 3, &device);
        let y = bottleneck.of(x, &Pass::inference(&device));
        // Hidden units 3 and 2.5; of the second token none is left.
        assert_eq!(tangent_ops::values(y), [8.0, 2.5, 7.0, 0.0, 0.0, 10.0]);
        assert_eq!(bottleneck.kept(), 3 + 2 * 2);
    }

    #[test]
    fn activations_are_those_of_their_names() {
        let device = Device::flex();
        for (name, at_one, at_minus_one) in [
            ("relu", 1.0, 0.0),
            ("gelu", 0.841_344_7, -0.158_655_3),
            ("swish", 0.731_058_6, -0.268_941_4),
            ("tanh", 0.761_594_2, -0.761_594_2),
        ] {
            let mut config = config("houlsby", &[]);
            let word = SettingValue::Text(name.to_owned().into());
            config.own.insert(ACTIVATION.to_owned(), word);
            let activation = Activation::of_setting(&config).unwrap();
            let x = tangent_ops::tensor(vec![1.0, -1.0], 1, 2, &device);
            let got = tangent_ops::values(activation.of(x));
            for (got, want) in got.iter().zip([at_one, at_minus_one]) {
                assert!((got - want).abs() < 1e-5, "{name}: {got}, not {want}");
            }
        }
    }

    #[test]
    fn the_authors_numbers_have_their_width_and_are_cut_off() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut drawn = |cut_off| {
            let numbers = Normal {
                deviation: 1e-3,
                cut_off,
            };
            let values = numbers.values(&mut rng, 4000);
            let largest = values.iter().fold(0f32, |a, v| a.max(v.abs()));
            let square = values.iter().map(|v| v * v).sum::<f32>() / 4000.0;
            (largest, square.sqrt())
        };
        let (largest, deviation) = drawn(false);
        assert!(largest > 2.5e-3 && (deviation / 1e-3 - 1.0).abs() < 0.05);
        let (largest, deviation) = drawn(true);
        assert!(largest <= 2e-3 && (deviation / 1e-3 - 0.88).abs() < 0.05);
    }
}
