//! What a forward pass is for: training or not, which device, which random numbers.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use tangent_ops::Tap;

use crate::parameter::Parameter;

/// A forward pass.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Whether dropout is on.
    pub training: bool,
    /// Whether trained tensors take part in automatic differentiation.
    pub tracked: bool,
    /// Where activations live (without automatic differentiation).
    pub device: Device,
    /// Key of the random numbers of this pass; passes with equal keys draw equal numbers, so a
    /// layer that is run again for its backward pass drops the same features.
    pub key: u64,
    /// Who is told of the inputs of linear maps and of the gradients of their results.
    pub tap: Option<Arc<dyn Tap>>,
    /// Keys and values of virtual tokens in all layers, where they are known; layers take their own
    /// from here. See [`forward::with_prefix`](crate::forward::with_prefix).
    pub prefix: Option<Tensor<2>>,
}

impl Pass {
    /// A pass without gradients.
    pub fn inference(device: &Device) -> Self {
        Self {
            training: false,
            tracked: false,
            device: device.clone(),
            key: 0,
            tap: None,
            prefix: None,
        }
    }

    /// A training pass with its key.
    pub fn training(device: &Device, key: u64) -> Self {
        Self {
            training: true,
            tracked: true,
            device: device.clone(),
            key,
            tap: None,
            prefix: None,
        }
    }

    /// The same pass, of whose linear maps `tap` is told.
    pub fn with_tap(self, tap: Arc<dyn Tap>) -> Self {
        Self {
            tap: Some(tap),
            ..self
        }
    }

    /// The same pass without gradients, dropping the same features.
    pub fn untracked(&self) -> Self {
        Self {
            tracked: false,
            prefix: self.prefix.clone().map(|x| x.without_autodiff()),
            ..self.clone()
        }
    }

    /// A parameter's tensor for this pass.
    pub fn value(&self, parameter: &Parameter) -> Tensor<2> {
        parameter.get(self.tracked)
    }

    /// The same pass with random numbers of its own for `path`.
    pub fn at(&self, path: &str) -> Self {
        let key = if self.training {
            mix(self.key, path)
        } else {
            0
        };
        Self {
            key,
            ..self.clone()
        }
    }
}

/// A key for `name` under `key` (64-bit FNV-1a), stable across versions and machines.
pub fn mix(key: u64, name: &str) -> u64 {
    key.to_le_bytes()
        .iter()
        .chain(name.as_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}
