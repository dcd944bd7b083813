//! The Llama family: SmolLM2, Llama 2 and 3, Mistral. Pre-norm decoder with rotary attention over
//! grouped heads and a SwiGLU feed-forward.

mod config;

use std::sync::{Arc, RwLock};

use burn::tensor::{Device, Tensor};
use tangent_ops::{AttentionShape, Rotary};

use super::{Activation, Attend, Family, FormedFrom, Model};
use crate::error::ModelError;
use crate::pass::Pass;
use crate::site::{Site, SiteKind};
use crate::sublayer::Sublayer;
use crate::weights::Weights;
use crate::whole::Whole;

pub use config::{Config, Rope, RopeScaling};

/// The family's entry.
pub const FAMILY: Family = Family {
    model_types: &["llama", "mistral"],
    open: |config, path, weights, device| {
        let config = Config::parse(config, path)?;
        Ok(Box::new(Llama::open(config, weights, device)?))
    },
};

struct Layer {
    input_layernorm: Site,
    q_proj: Site,
    k_proj: Site,
    v_proj: Site,
    o_proj: Site,
    self_attn: Sublayer,
    post_attention_layernorm: Site,
    gate_proj: Site,
    up_proj: Site,
    down_proj: Site,
    mlp: Sublayer,
}

/// A model of the family.
pub struct Llama {
    config: Config,
    device: Device,
    rotary: RwLock<Arc<Rotary>>,
    embed_tokens: Site,
    layers: Vec<Layer>,
    norm: Site,
    lm_head: Site,
    whole: Whole,
}

impl Llama {
    fn open(config: Config, weights: &Weights, device: &Device) -> Result<Self, ModelError> {
        let c = &config;
        let norm = |path: String, layer| -> Result<Site, ModelError> {
            let weight = weights.vector(&format!("{path}.weight"), c.hidden_size)?;
            Ok(Site::new(path, SiteKind::Norm, layer, weight))
        };
        let q = c.num_attention_heads * c.head_dim;
        let kv = c.num_key_value_heads * c.head_dim;
        let layer = |index: usize| -> Result<Layer, ModelError> {
            let linear = |name: &str, rows, cols, bias: bool| -> Result<Site, ModelError> {
                let path = format!("model.layers.{index}.{name}");
                let name = format!("{path}.weight");
                let weight = weights.matrix(&name, rows, cols)?;
                let (stored, original) = weights.original(&name, rows, cols).unzip();
                let bias = match bias {
                    true => Some(weights.vector(&format!("{path}.bias"), rows)?),
                    false => None,
                };
                let mut site = Site::new(path, SiteKind::Linear, Some(index), weight);
                (site.quantized_from, site.original, site.bias) = (stored, original, bias);
                Ok(site)
            };
            let (d, ff) = (c.hidden_size, c.intermediate_size);
            let (attention, mlp) = (c.attention_bias, c.mlp_bias);
            let path = |name: &str| format!("model.layers.{index}.{name}");
            Ok(Layer {
                input_layernorm: norm(path("input_layernorm"), Some(index))?,
                q_proj: linear("self_attn.q_proj", q, d, attention)?,
                k_proj: linear("self_attn.k_proj", kv, d, attention)?,
                v_proj: linear("self_attn.v_proj", kv, d, attention)?,
                o_proj: linear("self_attn.o_proj", d, q, attention)?,
                self_attn: Sublayer::new(path("self_attn"), index, d),
                post_attention_layernorm: norm(path("post_attention_layernorm"), Some(index))?,
                gate_proj: linear("mlp.gate_proj", ff, d, mlp)?,
                up_proj: linear("mlp.up_proj", ff, d, mlp)?,
                down_proj: linear("mlp.down_proj", d, ff, mlp)?,
                mlp: Sublayer::new(path("mlp"), index, d),
            })
        };
        let table = weights.table("model.embed_tokens.weight", c.vocab_size, c.hidden_size)?;
        let head = match c.tie_word_embeddings {
            true => table.clone(),
            false => weights.table("lm_head.weight", c.vocab_size, c.hidden_size)?,
        };
        let embedding = "model.embed_tokens".to_owned();
        let mut lm_head = Site::new("lm_head".into(), SiteKind::Head, None, head);
        lm_head.tied_to = c.tie_word_embeddings.then(|| embedding.clone());
        // The weights first: they show whether the sizes are true, before tables grow with them.
        let layers = (0..c.num_hidden_layers)
            .map(layer)
            .collect::<Result<Vec<_>, _>>()?;
        let frequencies = c.rope.inverse_frequencies(c.head_dim);
        Ok(Self {
            rotary: RwLock::new(Arc::new(Rotary::new(frequencies, 256))),
            device: device.clone(),
            embed_tokens: Site::new(embedding, SiteKind::Embedding, None, table),
            layers,
            norm: norm("model.norm".into(), None)?,
            lm_head,
            whole: Whole::default(),
            config,
        })
    }
}

impl Model for Llama {
    fn device(&self) -> Device {
        self.device.clone()
    }

    fn layers(&self) -> usize {
        self.layers.len()
    }

    fn vocabulary(&self) -> usize {
        self.config.vocab_size
    }

    fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            window: self.config.sliding_window,
        }
    }

    fn rotary(&self, positions: usize) -> Arc<Rotary> {
        let table = self
            .rotary
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .clone();
        if table.positions() >= positions {
            return table;
        }
        let longer = Arc::new(table.extended(positions.next_power_of_two()));
        *self.rotary.write().unwrap_or_else(|e| e.into_inner()) = longer.clone();
        longer
    }

    fn sites(&self) -> Vec<&Site> {
        let layers = self.layers.iter().flat_map(|l| {
            [
                &l.input_layernorm,
                &l.q_proj,
                &l.k_proj,
                &l.v_proj,
                &l.o_proj,
                &l.post_attention_layernorm,
                &l.gate_proj,
                &l.up_proj,
                &l.down_proj,
            ]
        });
        std::iter::once(&self.embed_tokens)
            .chain(layers)
            .chain([&self.norm, &self.lm_head])
            .collect()
    }

    fn sites_mut(&mut self) -> Vec<&mut Site> {
        let layers = self.layers.iter_mut().flat_map(|l| {
            [
                &mut l.input_layernorm,
                &mut l.q_proj,
                &mut l.k_proj,
                &mut l.v_proj,
                &mut l.o_proj,
                &mut l.post_attention_layernorm,
                &mut l.gate_proj,
                &mut l.up_proj,
                &mut l.down_proj,
            ]
        });
        std::iter::once(&mut self.embed_tokens)
            .chain(layers)
            .chain([&mut self.norm, &mut self.lm_head])
            .collect()
    }

    fn sublayers(&self) -> Vec<&Sublayer> {
        let layers = self.layers.iter();
        layers.flat_map(|l| [&l.self_attn, &l.mlp]).collect()
    }

    fn sublayers_mut(&mut self) -> Vec<&mut Sublayer> {
        let layers = self.layers.iter_mut();
        layers
            .flat_map(|l| [&mut l.self_attn, &mut l.mlp])
            .collect()
    }

    fn whole(&self) -> &Whole {
        &self.whole
    }

    fn whole_mut(&mut self) -> &mut Whole {
        &mut self.whole
    }

    fn embed(&self, ids: &Arc<[u32]>, pass: &Pass) -> Tensor<2> {
        self.embed_tokens.embed(ids, pass)
    }

    fn layer(&self, index: usize, x: Tensor<2>, attend: &mut Attend<'_>, pass: &Pass) -> Tensor<2> {
        let l = &self.layers[index];
        let eps = self.config.rms_norm_eps;
        let maps = [&l.q_proj, &l.k_proj, &l.v_proj];
        let (read, [q, k, v]) = l.self_attn.enter(&l.input_layernorm, eps, maps, &x, pass);
        let o = l.o_proj.linear(attend(q, k, v), pass);
        let x = l.self_attn.add(x, read, o, pass);
        let (norm, maps) = (&l.post_attention_layernorm, [&l.gate_proj, &l.up_proj]);
        let (read, [gate, up]) = l.mlp.enter(norm, eps, maps, &x, pass);
        let y = l.down_proj.gated_linear(gate, up, pass);
        l.mlp.add(x, read, y, pass)
    }

    fn activations(&self) -> Vec<Activation> {
        let c = &self.config;
        let (d, ff) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (
            c.num_attention_heads * c.head_dim,
            c.num_key_value_heads * c.head_dim,
        );
        vec![
            Activation::kept(d, &["input_layernorm"]),
            Activation::formed_again(
                d,
                FormedFrom::Norm("self_attn"),
                &["q_proj", "k_proj", "v_proj"],
            ),
            // Queries, keys and values, which attention keeps.
            Activation::kept(q, &[]),
            Activation::kept(kv, &[]),
            Activation::kept(kv, &[]),
            Activation::read(q, &["o_proj"]),
            Activation::read(0, &["self_attn"]),
            Activation::kept(d, &["post_attention_layernorm"]),
            Activation::formed_again(d, FormedFrom::Norm("mlp"), &["gate_proj", "up_proj"]),
            // Gate and up, which swiglu keeps, and their product.
            Activation::kept(ff, &[]),
            Activation::kept(ff, &[]),
            Activation::formed_again(ff, FormedFrom::Gate, &["down_proj"]),
            Activation::read(0, &["mlp"]),
        ]
    }

    fn norm_epsilon(&self) -> f32 {
        self.config.rms_norm_eps
    }

    fn final_norm(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
        self.norm.rms_norm(x, self.config.rms_norm_eps, pass)
    }

    fn head(&self) -> &Site {
        &self.lm_head
    }
}
