//! Recipes: named combinations of method, start values, optimizer, scaling and learning rates. A
//! recipe is one line in [`RECIPES`].

use tangent_peft::methods::{self, Common, intrinsic};
use tangent_peft::{
    AdapterConfig, Attach, PeftError, SettingValue, Targets, init as start_values, name,
};

use super::error::CompareError;
use crate::config::TrainConfig;
use crate::optim::{self, LoraPlus, Rule};

/// A recipe.
#[derive(Debug)]
pub struct Recipe {
    /// Name in flags and reports.
    pub id: &'static str,
    /// What it is, in a few words for tables.
    pub summary: &'static str,
    /// The learning rate around which a better one is looked for.
    pub usual_rate: f64,
    /// Id of its method.
    method: &'static str,
    /// What makes it larger or smaller.
    size: Size,
    /// Changes the settings that all recipes begin with; the rank is set.
    change: fn(&mut AdapterConfig, &mut TrainConfig),
}

/// What makes an adapter larger or smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// Its rank.
    Rank,
    /// Its rank, which is even.
    EvenRank,
    /// The rank that is left at the end, a setting of this name. It begins with half more.
    LastRank(&'static str),
    /// A setting of the method that counts something from 2 on; 0 where another one decides.
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// What it is, for tables.
        words: &'static str,
    },
    /// Nothing: the model decides.
    Fixed,
}

/// What a recipe's rank is called in tables.
pub const RANK: &str = "rank";

/// What the size of OFT's blocks is called in tables.
pub const BLOCK_SIZE: &str = "block size";

const LEFT: Size = Size::LastRank("target_r");

const BLOCKS: Size = Size::Setting {
    name: "oft_block_size",
    words: BLOCK_SIZE,
};

const DIMENSION: Size = Size::Setting {
    name: "dimension",
    words: "dimension",
};

const TOKENS: Size = Size::Setting {
    name: "num_virtual_tokens",
    words: "virtual tokens",
};

const UNITS: Size = Size::Setting {
    name: "bottleneck_size",
    words: "bottleneck",
};

/// The setting of start values by which ranks move between sites.
const RHO: &str = "rho";

/// Settings that all recipes begin with.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// Dropout of adapters and what they leave out; recipes choose the rest.
    pub adapter: AdapterConfig,
    /// Targets; each method's own if `None`.
    pub targets: Option<Targets>,
    /// Rank of the recipes that have one, at the end where it falls; each method's default if `None`.
    pub rank: Option<usize>,
    /// Numerator of the scaling; twice the rank, at the start where it falls, if `None`.
    pub alpha: Option<f32>,
    /// Largest norm of the gradients of a step; each rule's own if `None`.
    pub max_grad_norm: Option<f32>,
    /// The loop; the rate, the optimizer, the largest norm of gradients and the length of a run are
    /// chosen for each.
    pub train: TrainConfig,
}

/// A recipe with all settings but the learning rate, the seed and the length.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// The adapter.
    pub adapter: AdapterConfig,
    /// The loop.
    pub train: TrainConfig,
    /// Rank, at the end where it falls, or the setting in its place; 0 where there is none.
    pub size: usize,
}

/// Every recipe: name, what it is, method, usual rate, and what it changes.
#[rustfmt::skip]
pub const RECIPES: &[Recipe] = &[
    recipe("lora", "LoRA", "lora", 2e-4, |_, _| {}),
    recipe("rslora", "scaled by alpha / sqrt(rank)", "lora", 1e-4, |a, _| a.use_rslora = true),
    recipe("lora+", "B at 16 times the rate of A", "lora", 1e-4, |_, t| lora_plus(t, 16.0)),
    recipe("dora", "LoRA on directions, trained lengths", "dora", 2e-4, |_, _| {}),
    recipe("gaussian", "A normal", "lora", 2e-4, |a, _| init(a, "gaussian")),
    recipe("orthogonal", "A and B random, their product 0", "lora", 2e-4, |a, _| init(a, "orthogonal")).sized_by(Size::EvenRank),
    recipe("pissa", "from the largest singular triplets", "lora", 1e-4, |a, _| init(a, "pissa")),
    recipe("olora", "from a QR decomposition", "lora", 1e-4, |a, _| init(a, "olora")),
    recipe("milora", "from the least singular triplets", "lora", 2e-4, |a, _| init(a, "milora")),
    recipe("lora-ga", "from the full gradient", "lora", 1e-4, |a, _| init(a, "lora-ga")),
    recipe("eva", "from the inputs, ranks moved", "lora", 2e-4, |a, _| redistributed(a)),
    recipe("corda", "from weights and inputs", "lora", 1e-4, |a, _| init(a, "corda")),
    recipe("loftq", "from what quantization lost", "lora", 2e-4, |a, _| init(a, "loftq")),
    recipe("qpissa", "pissa, the base quantized anew", "lora", 1e-4, |a, _| init(a, "qpissa")),
    recipe("adalora", "ranks move between weights", "adalora", 1e-3, |_, _| {}).sized_by(LEFT),
    recipe("lora-pro", "steps as full fine-tuning's", "lora", 2e-5, |_, t| optim(t, "lora-pro")),
    recipe("lora-pro-sgd", "lora-pro without moments", "lora", 1e-1, |_, t| optim(t, "lora-pro-sgd")),
    recipe("lora-ga+lora-pro", "both of them", "lora", 2e-5, aligned),
    recipe("altlora+", "A and B in turn", "lora", 2e-4, |_, t| optim(t, "altlora+")),
    recipe("lora-rite", "whatever the factors", "lora", 2e-4, |_, t| optim(t, "lora-rite")),
    recipe("vera", "vectors around random projections", "vera", 3e-3, |_, _| {}),
    recipe("ia3", "vectors that scale activations", "ia3", 3e-3, |_, _| {}).fixed(),
    recipe("loha", "two low-rank products, elementwise", "loha", 1e-3, |_, _| {}),
    recipe("lokr", "Kronecker product of small matrices", "lokr", 1e-3, |_, _| {}),
    recipe("oft", "rotations of inputs", "oft", 3e-4, |a, _| nearest(a)).sized_by(BLOCKS),
    recipe("monarch", "block-diagonal factors, permuted", "monarch", 5e-4, |_, _| {}),
    recipe("intrinsic", "a random subspace", "intrinsic", 1e-2, |_, _| {}).sized_by(DIMENSION),
    recipe("prompt-tuning", "embeddings of virtual tokens", "prompt-tuning", 1e-2, |_, _| {}).sized_by(TOKENS),
    recipe("p-tuning", "virtual tokens out of a network", "p-tuning", 1e-3, |_, _| {}).sized_by(TOKENS),
    recipe("prefix-tuning", "keys and values of virtual tokens", "prefix-tuning", 5e-3, |a, _| sampled(a)).sized_by(TOKENS),
    recipe("lst", "a narrow network beside the layers", "lst", 3e-3, |_, _| {}).fixed(),
    recipe("houlsby", "bottlenecks after sub-layers", "houlsby", 5e-4, |_, _| {}).sized_by(UNITS),
    recipe("pfeiffer", "bottlenecks after feed-forwards", "pfeiffer", 5e-4, |_, _| {}).sized_by(UNITS),
    recipe("lin", "normalized bottlenecks", "lin", 5e-4, |_, _| {}).sized_by(UNITS),
    recipe("parallel-adapter", "bottlenecks beside feed-forwards", "parallel-adapter", 2e-4, |_, _| {}).sized_by(UNITS),
    recipe("bitfit", "biases", "bitfit", 1e-3, |_, _| {}).fixed(),
    recipe("norms", "scales of normalizations", "norms", 1e-3, |_, _| {}).fixed(),
    recipe("last-layers", "the last two layers", "last-layers", 5e-5, |_, _| {}).fixed(),
    recipe("select", "attention's weights", "select", 5e-5, |_, _| {}).fixed(),
    recipe("full", "full fine-tuning", "full", 2e-5, |_, _| {}),
];

const fn recipe(
    id: &'static str,
    summary: &'static str,
    method: &'static str,
    usual_rate: f64,
    change: fn(&mut AdapterConfig, &mut TrainConfig),
) -> Recipe {
    Recipe {
        id,
        summary,
        usual_rate,
        method,
        size: Size::Rank,
        change,
    }
}

fn init(adapter: &mut AdapterConfig, id: &str) {
    adapter.init = id.into();
}

fn optim(train: &mut TrainConfig, id: &str) {
    train.optimizer = id.into();
}

fn lora_plus(train: &mut TrainConfig, ratio: f64) {
    train.lora_plus = Some(LoraPlus::new(ratio));
}

fn aligned(adapter: &mut AdapterConfig, train: &mut TrainConfig) {
    init(adapter, "lora-ga");
    optim(train, "lora-pro");
}

fn set(adapter: &mut AdapterConfig, name: &str, value: SettingValue) {
    adapter.own.insert(name.into(), value);
}

/// Ranks move from site to site, up to twice as many as elsewhere, as the authors of EVA let them.
fn redistributed(adapter: &mut AdapterConfig) {
    init(adapter, "eva");
    set(adapter, RHO, SettingValue::Number(2.0));
}

/// Blocks of the nearest size that divides a weight's inputs.
fn nearest(adapter: &mut AdapterConfig) {
    set(adapter, "nearest_divisor", SettingValue::Flag(true));
}

/// Keys and values that begin with those of tokens.
fn sampled(adapter: &mut AdapterConfig) {
    set(adapter, "prefix_init", SettingValue::text("sample-vocab"));
}

impl Recipe {
    /// The recipe, sized by something else than a rank.
    const fn sized_by(self, size: Size) -> Self {
        Self { size, ..self }
    }

    /// What its size is: a rank, or what its method has in the place of one.
    pub fn size_name(&self) -> &'static str {
        match self.size {
            Size::Rank | Size::EvenRank | Size::LastRank(_) | Size::Fixed => RANK,
            Size::Setting { words, .. } => words,
        }
    }

    /// The recipe, of one size.
    const fn fixed(self) -> Self {
        Self {
            size: Size::Fixed,
            ..self
        }
    }

    /// Whether its size is the number of parameters that it trains.
    pub(super) fn counts_parameters(&self) -> bool {
        self.size == DIMENSION
    }

    /// The settings of a variant's adapter in a run with this seed: random projections are other ones
    /// for each, so that results over seeds tell how much they matter.
    pub(super) fn seeded(adapter: &AdapterConfig, seed: u64) -> AdapterConfig {
        let mut adapter = adapter.clone();
        if adapter.method == intrinsic::METHOD.id {
            let seed = SettingValue::Number(f64::from(seed as u32));
            set(&mut adapter, intrinsic::SEED, seed);
        }
        adapter
    }

    /// Its rank at the start, where the size is the one that is left at the end.
    pub(super) fn first_rank(&self, variant: &Variant) -> Option<usize> {
        matches!(self.size, Size::LastRank(_)).then_some(variant.adapter.rank)
    }

    /// Lets ranks stay where start values would move them, which changes how much trains.
    pub(super) fn keep_ranks(adapter: &mut AdapterConfig) -> Result<(), PeftError> {
        if start_values::find(&adapter.init)?.redistributes {
            set(adapter, RHO, SettingValue::Number(1.0));
        }
        Ok(())
    }

    /// The smallest size that it can have.
    pub(super) fn least_size(&self) -> usize {
        match self.size {
            Size::Rank | Size::LastRank(_) => 1,
            Size::EvenRank | Size::Setting { .. } => 2,
            Size::Fixed => 0,
        }
    }

    /// The largest size of up to `size` that it can have.
    pub(super) fn possible_size(&self, size: usize) -> usize {
        match self.size {
            Size::EvenRank => size - size % 2,
            _ => size,
        }
    }

    /// The settings of the recipe, of the usual size if none is given. Shared settings that its
    /// method does not read are left out.
    ///
    /// # Errors
    /// If its method does not exist.
    pub fn variant(&self, shared: &Shared, size: Option<usize>) -> Result<Variant, PeftError> {
        let method = methods::find(self.method)?;
        let (mut adapter, mut train) = (shared.adapter.clone(), shared.train.clone());
        if method.whole_model {
            adapter = AdapterConfig::default();
        } else if method.targets.is_empty() || !matches!(method.attach, Attach::Weight(_)) {
            // What is shared names linear maps.
            (adapter.targets, adapter.exclude) = (method.usual_targets(), None);
        } else {
            let targets = shared.targets.clone();
            adapter.targets = targets.unwrap_or_else(|| method.usual_targets());
        }
        adapter.method = method.id.into();
        let rank = size.or(shared.rank);
        adapter.rank = match self.size {
            _ if method.whole_model => method.rank,
            Size::Rank | Size::EvenRank => rank.unwrap_or(method.rank),
            Size::LastRank(name) => {
                let left = rank.unwrap_or_else(|| adapter.own(name).number() as usize);
                set(&mut adapter, name, SettingValue::Number(left as f64));
                (3 * left).div_ceil(2)
            }
            Size::Setting { .. } | Size::Fixed => method.rank,
        };
        adapter.alpha = shared.alpha.unwrap_or(2.0 * adapter.rank as f32);
        if !method.reads.contains(&Common::Dropout) {
            adapter.dropout = 0.0;
        }
        (self.change)(&mut adapter, &mut train);
        let own_norm = optim::find(&train.optimizer).map(Rule::max_grad_norm);
        let norm = shared.max_grad_norm.or(own_norm.ok());
        train.max_grad_norm = norm.unwrap_or(train.max_grad_norm);
        let size = match self.size {
            _ if method.whole_model => 0,
            Size::Fixed => 0,
            Size::Rank | Size::EvenRank => adapter.rank,
            Size::LastRank(name) => adapter.own(name).number() as usize,
            Size::Setting { name, .. } => {
                let size = size.unwrap_or_else(|| adapter.own(name).number() as usize);
                set(&mut adapter, name, SettingValue::Number(size as f64));
                size
            }
        };
        Ok(Variant {
            adapter,
            train,
            size,
        })
    }
}

/// The recipes of these names, in their order.
///
/// # Errors
/// If one does not exist or is named twice.
pub fn find(names: &[String]) -> Result<Vec<&'static Recipe>, CompareError> {
    let mut found: Vec<&'static Recipe> = vec![];
    for name in names {
        let recipe = name::find(RECIPES, name, |recipe| recipe.id);
        let recipe = recipe.map_err(CompareError::UnknownRecipe)?;
        if found.iter().any(|r| r.id == recipe.id) {
            return Err(CompareError::Twice { name: recipe.id });
        }
        found.push(recipe);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use tangent_peft::init::INITS;
    use tangent_peft::methods::METHODS;

    use super::*;
    use crate::optim::RULES;

    #[test]
    fn recipes_name_what_exists() {
        let shared = Shared {
            adapter: AdapterConfig {
                dropout: 0.1,
                exclude: Some(Targets::parse(&["down_proj".into()])),
                ..AdapterConfig::default()
            },
            targets: Some(Targets::default()),
            ..Shared::default()
        };
        for (index, recipe) in RECIPES.iter().enumerate() {
            assert!(RECIPES[..index].iter().all(|r| r.id != recipe.id));
            let variant = recipe.variant(&shared, None).unwrap();
            let named = |e: &dyn std::fmt::Display| panic!("{}: {e}", recipe.id);
            variant.adapter.validate().unwrap_or_else(|e| named(&e));
            variant.train.validate().unwrap_or_else(|e| named(&e));
            let may_be_0 = recipe.id == "full" || recipe.size != Size::Rank;
            assert!(variant.size > 0 || may_be_0, "{}", recipe.id);
            optim::find(&variant.train.optimizer).unwrap();
        }
    }

    #[test]
    fn what_has_no_size_is_possible_at_any_budget() {
        let has_none = |recipe: &&Recipe| {
            let variant = recipe.variant(&Shared::default(), None).unwrap();
            variant.size == 0
        };
        let without: Vec<&Recipe> = RECIPES.iter().filter(has_none).collect();
        assert!(without.iter().any(|recipe| recipe.id == "full"));
        for recipe in without {
            let variant = recipe.variant(&Shared::default(), Some(0)).unwrap();
            variant.adapter.validate().unwrap();
        }
    }

    #[test]
    fn everything_that_is_published_has_a_recipe() {
        let variants: Vec<Variant> = RECIPES
            .iter()
            .map(|r| r.variant(&Shared::default(), None).unwrap())
            .collect();
        let has = |what: &dyn Fn(&Variant) -> bool| variants.iter().any(what);
        for method in METHODS {
            assert!(has(&|v| v.adapter.method == method.id), "{}", method.id);
        }
        for init in INITS {
            assert!(has(&|v| v.adapter.init == init.id), "{}", init.id);
        }
        // Plain SGD belongs to no published way of training adapters.
        for rule in RULES.iter().filter(|rule| rule.id != "sgd") {
            assert!(has(&|v| v.train.optimizer == rule.id), "{}", rule.id);
        }
    }

    #[test]
    fn recipes_differ() {
        let variants: Vec<Variant> = RECIPES
            .iter()
            .map(|r| r.variant(&Shared::default(), None).unwrap())
            .collect();
        for (index, variant) in variants.iter().enumerate() {
            let others = &variants[..index];
            assert!(!others.contains(variant), "{}", RECIPES[index].id);
        }
    }

    #[test]
    fn a_size_is_that_of_the_recipe() {
        let shared = Shared {
            rank: Some(4),
            ..Shared::default()
        };
        let of = |name: &str, size| {
            let recipe = find(&[name.to_owned()]).unwrap()[0];
            recipe.variant(&shared, size).unwrap()
        };
        let lora = of("lora", None);
        assert_eq!(
            (lora.size, lora.adapter.rank, lora.adapter.alpha),
            (4, 4, 8.0)
        );
        let lora = of("lora", Some(6));
        assert_eq!(
            (lora.size, lora.adapter.rank, lora.adapter.alpha),
            (6, 6, 12.0)
        );
        // As many are left as other recipes have from the beginning.
        for (size, left, first, alpha) in [(None, 4, 6, 12.0), (Some(8), 8, 12, 24.0)] {
            let adalora = of("adalora", size);
            assert_eq!(adalora.adapter.own["target_r"].number(), left as f64);
            assert_eq!((adalora.size, adalora.adapter.rank), (left, first));
            assert_eq!(adalora.adapter.alpha, alpha);
        }
        let adalora = find(&["adalora".to_owned()]).unwrap()[0];
        let usual = adalora.variant(&Shared::default(), None).unwrap();
        assert_eq!((usual.size, adalora.first_rank(&usual)), (8, Some(12)));
        let oft = of("oft", Some(16));
        assert_eq!(oft.adapter.own["oft_block_size"].number(), 16.0);
        assert_eq!(of("oft", None).size, 32);
        let prompt = of("prompt-tuning", Some(7));
        assert_eq!((prompt.size, prompt.adapter.virtual_tokens()), (7, 7));
        assert_eq!(of("prefix-tuning", None).adapter.virtual_tokens(), 20);
        let houlsby = of("houlsby", None);
        assert_eq!((houlsby.size, of("houlsby", Some(6)).size), (64, 6));
        // Its width follows from the model's unless it is given.
        let pfeiffer = of("pfeiffer", Some(6));
        assert_eq!((of("pfeiffer", None).size, pfeiffer.size), (0, 6));
        assert_eq!(pfeiffer.adapter.own["bottleneck_size"].number(), 6.0);
        assert_eq!((of("ia3", Some(6)).size, of("full", Some(6)).size), (0, 0));
        // All ranks are one and the same run.
        let lst = of("lst", Some(6));
        assert_eq!((lst.size, &lst), (0, &of("lst", None)));
        let name = |name: &str| find(&[name.to_owned()]).unwrap()[0].size_name();
        assert_eq!((name("lora"), name("oft")), ("rank", "block size"));
    }

    #[test]
    fn gradients_are_clipped_as_a_rule_s_authors_do_unless_a_norm_is_given() {
        for (given, want) in [(None, [1.0, 0.0]), (Some(0.5), [0.5; 2])] {
            let shared = Shared {
                max_grad_norm: given,
                ..Shared::default()
            };
            let norms = ["lora-pro", "lora-rite"].map(|name| {
                let recipe = find(&[name.to_owned()]).unwrap()[0];
                recipe.variant(&shared, None).unwrap().train.max_grad_norm
            });
            assert_eq!(norms, want);
        }
    }

    #[test]
    fn ranks_that_move_can_be_kept() {
        let of = |name: &str| {
            let recipe = find(&[name.to_owned()]).unwrap()[0];
            recipe.variant(&Shared::default(), None).unwrap().adapter
        };
        let (mut eva, mut lora) = (of("eva"), of("lora"));
        assert_eq!(eva.own(RHO).number(), 2.0);
        Recipe::keep_ranks(&mut eva).unwrap();
        assert_eq!(eva.own(RHO).number(), 1.0);
        Recipe::keep_ranks(&mut lora).unwrap();
        assert_eq!(lora, of("lora"));
    }

    #[test]
    fn seeds_draw_other_projections() {
        let of = |name: &str, seed| {
            let recipe = find(&[name.to_owned()]).unwrap()[0];
            let variant = recipe.variant(&Shared::default(), None).unwrap();
            (
                Recipe::seeded(&variant.adapter, seed),
                variant.adapter.clone(),
            )
        };
        for seed in [0, 5] {
            let (seeded, _) = of("intrinsic", seed);
            assert_eq!(seeded.own(intrinsic::SEED).number(), seed as f64);
            seeded.validate().unwrap();
        }
        let (seeded, plain) = of("lora", 5);
        assert_eq!(seeded, plain);
    }

    #[test]
    fn unknown_and_repeated_names_are_refused() {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let text = find(&names(&["lora", "lorra"])).unwrap_err().to_string();
        assert!(
            text.contains("did you mean \"lora\"?") && text.contains("lora, rslora"),
            "{text}"
        );
        let found = find(&names(&["lora_ga+lora_pro"])).unwrap();
        assert_eq!(found[0].id, "lora-ga+lora-pro");
        let text = find(&names(&["dora", "dora"])).unwrap_err().to_string();
        assert!(text.contains("dora is named twice"), "{text}");
    }
}
