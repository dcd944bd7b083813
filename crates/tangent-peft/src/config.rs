//! The settings of an adapter, independent of the method's own parameters.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::error::PeftError;
use crate::init;
use crate::methods::{self, Attach, Common, Method, virtual_tokens};
use crate::setting::{self, SettingValue};
use crate::targets::Targets;

/// Which biases train along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BiasMode {
    /// None.
    #[default]
    None,
    /// Those of every site that has one.
    All,
    /// Those of adapted sites.
    LoraOnly,
}

impl BiasMode {
    /// The name in files and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }
}

impl FromStr for BiasMode {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "none" => Ok(Self::None),
            "all" => Ok(Self::All),
            "lora_only" | "lora-only" => Ok(Self::LoraOnly),
            other => Err(format!("\"{other}\" is not one of none, all, lora_only")),
        }
    }
}

/// Which methods read a setting.
#[derive(Clone, Copy)]
enum Reads {
    /// Those that list it.
    If(Common),
    /// Those that let sites be chosen.
    OfSites,
    /// Those whose files have tensors of modules.
    OfModules,
    /// Those that train less than the whole model.
    OfPart,
}

impl Reads {
    fn by(self, method: &Method) -> bool {
        let bare = || method.peft.as_ref().is_some_and(|kind| !kind.of_modules);
        match self {
            Self::If(common) => method.reads.contains(&common),
            Self::OfSites => !method.targets.is_empty(),
            Self::OfModules => !method.whole_model && !bare(),
            Self::OfPart => !method.whole_model,
        }
    }
}

/// What to attach and where.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Id of the method.
    pub method: String,
    /// Rank of the low-rank product.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f32,
    /// Scaling `alpha / sqrt(rank)` instead of `alpha / rank` (rsLoRA, 2312.03732).
    pub use_rslora: bool,
    /// Probability of dropping a feature of the adapter's input in training.
    pub dropout: f32,
    /// Sites to adapt.
    pub targets: Targets,
    /// Sites left out of the targets.
    pub exclude: Option<Targets>,
    /// Layers whose sites are adapted; all when `None`.
    pub layers: Option<Vec<usize>>,
    /// Ranks of sites whose path matches a pattern; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of sites whose path matches a pattern; the first match counts.
    pub alpha_pattern: Vec<(String, f32)>,
    /// Biases that train along.
    pub bias: BiasMode,
    /// Modules that train whole: a site trains if its path ends with one of these.
    pub modules_to_save: Vec<String>,
    /// Rows of embeddings that train, by module suffix.
    pub trainable_tokens: BTreeMap<String, Vec<u32>>,
    /// Id of the initialization.
    pub init: String,
    /// Settings of the method and of the initialization, by name; their lists have the defaults.
    pub own: BTreeMap<String, SettingValue>,
    /// Which of AdaLoRA's triplets are left, by path of the site, as a file says; none are gone at
    /// other sites.
    pub kept_triplets: BTreeMap<String, Vec<bool>>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            method: "lora".into(),
            rank: 8,
            alpha: 16.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::default(),
            exclude: None,
            layers: None,
            rank_pattern: vec![],
            alpha_pattern: vec![],
            bias: BiasMode::None,
            modules_to_save: vec![],
            trainable_tokens: BTreeMap::new(),
            init: init::KAIMING.id.into(),
            own: BTreeMap::new(),
            kept_triplets: BTreeMap::new(),
        }
    }
}

impl AdapterConfig {
    /// Checks the settings that need no model.
    ///
    /// # Errors
    /// If one is out of its range, or is read by neither the method nor the initialization.
    pub fn validate(&self) -> Result<(), PeftError> {
        let fault = |setting, value: String, why| PeftError::Setting {
            setting,
            value,
            why,
        };
        let method = methods::find(&self.method)?;
        if self.rank == 0 {
            return Err(fault("rank", "0".into(), "must be at least 1"));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return Err(fault("alpha", self.alpha.to_string(), "must be above 0"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let value = self.dropout.to_string();
            return Err(fault("dropout", value, "must be in [0, 1)"));
        }
        init::find(&self.init)?;
        setting::check(&self.own, self.own_settings(method)?)?;
        self.refuse_unread(method)
    }

    /// What the method and the initialization read beyond the common settings.
    fn own_settings(
        &self,
        method: &Method,
    ) -> Result<impl Iterator<Item = &'static setting::Setting>, PeftError> {
        let init = match method.reads.contains(&Common::Init) {
            true => init::find(&self.init)?.settings,
            false => &[],
        };
        Ok(method.settings.iter().chain(init))
    }

    /// A setting of the method or of the initialization: as given, or its default.
    ///
    /// # Panics
    /// If neither has it in its list.
    pub fn own(&self, name: &str) -> SettingValue {
        let listed = |settings: &'static [setting::Setting]| {
            let found = settings.iter().find(|s| s.name == name);
            found.map(|s| s.default.clone())
        };
        let default = || {
            let method = methods::find(&self.method).ok()?;
            let init = || listed(init::find(&self.init).ok()?.settings);
            listed(method.settings).or_else(init)
        };
        match self.own.get(name).cloned().or_else(default) {
            Some(value) => value,
            None => unreachable!("{name} is in no list of {} or {}", self.method, self.init),
        }
    }

    /// Virtual tokens before every row; 0 for methods without them.
    pub fn virtual_tokens(&self) -> usize {
        let method = methods::find(&self.method);
        if !method.is_ok_and(|m| matches!(m.attach, Attach::Prefix(_))) {
            return 0;
        }
        let tokens = self.own(virtual_tokens::COUNT).whole();
        tokens.and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
    }

    /// The text whose tokens virtual tokens begin with, given to
    /// [`attach_from`](crate::attach_from) as [`Start::prompt`](crate::Start): a setting of the
    /// method.
    pub fn prompt_text(&self) -> Option<&str> {
        let given = virtual_tokens::TEXTS.iter();
        let mut texts = given.filter_map(|name| Some(self.own.get(*name)?.word()));
        texts.find(|text| !text.is_empty())
    }

    /// A setting of the method or of the initialization that counts; `why` says that it is at least
    /// `least`.
    ///
    /// # Errors
    /// If it is something else.
    ///
    /// # Panics
    /// As [`own`](Self::own).
    pub(crate) fn whole(
        &self,
        setting: &'static str,
        least: usize,
        why: &'static str,
    ) -> Result<usize, PeftError> {
        let value = self.own(setting);
        let count = value.whole().and_then(|n| usize::try_from(n).ok());
        count
            .filter(|n| *n >= least)
            .ok_or_else(|| PeftError::Setting {
                setting,
                value: value.to_string(),
                why,
            })
    }

    /// Names, as in files, of the settings that the method does not read.
    ///
    /// # Errors
    /// If there is no such method.
    pub fn unread(&self) -> Result<Vec<&'static str>, PeftError> {
        let method = methods::find(&self.method)?;
        let settings = self.not_read_by_all().into_iter();
        let unread = settings.filter(|(_, reads, ..)| !reads.by(method));
        Ok(unread.map(|(name, ..)| name).collect())
    }

    /// Settings that not every method reads: name, who reads it, whether it is at its default,
    /// value.
    fn not_read_by_all(&self) -> [(&'static str, Reads, bool, String); 14] {
        let default = Self::default();
        [
            // The defaults of these two are the method's; whoever typed them checks that.
            ("rank", Reads::If(Common::Rank), true, self.rank.to_string()),
            (
                "alpha",
                Reads::If(Common::Alpha),
                true,
                self.alpha.to_string(),
            ),
            (
                "use_rslora",
                Reads::If(Common::Rslora),
                self.use_rslora == default.use_rslora,
                self.use_rslora.to_string(),
            ),
            (
                "dropout",
                Reads::If(Common::Dropout),
                self.dropout == default.dropout,
                self.dropout.to_string(),
            ),
            (
                "init",
                Reads::If(Common::Init),
                self.init == default.init,
                self.init.clone(),
            ),
            (
                "rank_pattern",
                Reads::If(Common::Patterns),
                self.rank_pattern == default.rank_pattern,
                format!("{:?}", self.rank_pattern),
            ),
            (
                "alpha_pattern",
                Reads::If(Common::Patterns),
                self.alpha_pattern == default.alpha_pattern,
                format!("{:?}", self.alpha_pattern),
            ),
            (
                "bias",
                Reads::If(Common::Bias),
                self.bias == default.bias,
                self.bias.name().to_owned(),
            ),
            (
                "trainable_token_indices",
                Reads::If(Common::TokenRows),
                self.trainable_tokens == default.trainable_tokens,
                format!("{:?}", self.trainable_tokens),
            ),
            (
                "target_modules",
                Reads::OfSites,
                self.targets == default.targets,
                self.targets.text(),
            ),
            (
                "exclude_modules",
                Reads::OfSites,
                self.exclude == default.exclude,
                self.exclude.as_ref().map(Targets::text).unwrap_or_default(),
            ),
            (
                "layers_to_transform",
                Reads::OfSites,
                self.layers == default.layers,
                format!("{:?}", self.layers),
            ),
            (
                "modules_to_save",
                Reads::OfModules,
                self.modules_to_save == default.modules_to_save,
                self.modules_to_save.join(", "),
            ),
            (
                "set",
                Reads::OfPart,
                self.own.is_empty(),
                format!("{:?}", self.own),
            ),
        ]
    }

    /// Refuses settings that the method does not read.
    ///
    /// # Errors
    /// Naming the first that differs from its default.
    fn refuse_unread(&self, method: &Method) -> Result<(), PeftError> {
        let whole = method.whole_model;
        let mut set = self
            .not_read_by_all()
            .into_iter()
            .filter(|(_, reads, is_default, _)| !reads.by(method) && !is_default);
        match set.next() {
            None => Ok(()),
            Some((setting, Reads::If(common), _, value)) if !whole => Err(PeftError::Unread {
                setting,
                value,
                method: method.id,
                readers: methods::readers(common),
            }),
            Some((setting, _, _, value)) => Err(PeftError::Setting {
                setting,
                value,
                why: match whole {
                    true => {
                        "every weight of the model trains, so this has no effect; leave it out, or \
                         choose another method"
                    }
                    false => "this method does not read it; leave it out, or choose another method",
                },
            }),
        }
    }

    /// Rank at the site `path`.
    ///
    /// # Errors
    /// If a pattern does not parse.
    pub fn rank_at(&self, path: &str) -> Result<usize, PeftError> {
        Ok(first_match(&self.rank_pattern, path)?.unwrap_or(self.rank))
    }

    /// Alpha at the site `path`.
    ///
    /// # Errors
    /// If a pattern does not parse.
    pub fn alpha_at(&self, path: &str) -> Result<f32, PeftError> {
        Ok(first_match(&self.alpha_pattern, path)?.unwrap_or(self.alpha))
    }

    /// Scaling at the site `path`: `alpha / rank`, or `alpha / sqrt(rank)`.
    ///
    /// # Errors
    /// If a pattern does not parse.
    pub fn scaling_at(&self, path: &str) -> Result<f32, PeftError> {
        let rank = self.rank_at(path)? as f64;
        let alpha = f64::from(self.alpha_at(path)?);
        let divisor = if self.use_rslora { rank.sqrt() } else { rank };
        Ok((alpha / divisor) as f32)
    }
}

/// PEFT's rule: the key matches at the end of the path, after a dot or from its start.
pub(crate) fn pattern_regex(key: &str) -> Result<regex::Regex, PeftError> {
    let whole = regex::Regex::new(&format!(r"^(.*\.)?({key})$"));
    whole.map_err(|e| PeftError::Pattern {
        pattern: key.to_owned(),
        why: e.to_string(),
    })
}

fn first_match<T: Copy>(patterns: &[(String, T)], path: &str) -> Result<Option<T>, PeftError> {
    for (key, value) in patterns {
        if pattern_regex(key)?.is_match(path) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_method_does_not_read_is_refused_with_those_that_do() {
        let config = AdapterConfig {
            method: "adalora".into(),
            init: "pissa".into(),
            ..AdapterConfig::default()
        };
        let text = config.validate().unwrap_err().to_string();
        assert_eq!(
            text,
            "init = pissa: method adalora does not read it; leave it out, or choose a method that \
             does: lora, dora"
        );
    }

    #[test]
    fn patterns_match_at_the_end_and_the_first_counts() {
        let config = AdapterConfig {
            rank_pattern: vec![
                ("layers.1.self_attn.q_proj".into(), 2),
                ("q_proj".into(), 3),
            ],
            alpha_pattern: vec![("q_proj".into(), 12.0)],
            ..AdapterConfig::default()
        };
        let at = |path: &str| {
            (
                config.rank_at(path).unwrap(),
                config.scaling_at(path).unwrap(),
            )
        };
        assert_eq!(at("model.layers.1.self_attn.q_proj"), (2, 6.0));
        assert_eq!(at("model.layers.0.self_attn.q_proj"), (3, 4.0));
        assert_eq!(at("model.layers.0.self_attn.xq_proj"), (8, 2.0));
    }
}
