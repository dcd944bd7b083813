//! What trains, site by site, told without the tensors themselves.

use tangent_model::family::Model;
use tangent_model::{Parameter, Site, SiteKind};
use tangent_peft::methods::cost::Cost;
use tangent_peft::methods::{self, Common};
use tangent_peft::{Adapter, PeftError};

use super::Draft;
use crate::optim::PairShape;

/// How a site trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Its weight itself.
    Whole,
    /// A method of thin matrices beside its frozen weight.
    LowRank {
        /// Their thin side.
        rank: usize,
    },
    /// A method without a rank beside its frozen weight.
    Adapted,
    /// Some rows of an embedding.
    Rows(usize),
    /// Its bias alone.
    Bias,
}

/// A site that trains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainedSite {
    /// Path of the site.
    pub path: String,
    /// What its weight is used for.
    pub kind: SiteKind,
    /// The layer that it belongs to.
    pub layer: Option<usize>,
    /// `(d_out, d_in)` of its weight.
    pub shape: (usize, usize),
    /// How it trains.
    pub form: Form,
    /// Trained values; none where the tensor is another site's (a tied head).
    pub parameters: usize,
    /// Frozen values that they take the place of.
    pub replaced: usize,
    /// Values that do not train and that all sites of the adapter share, counted at the first one.
    pub shared: usize,
    /// Sizes of the factors, where some optimizers move two of them together.
    pub pair: Option<PairShape>,
}

impl TrainedSite {
    /// The last part of the path.
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }

    fn new(site: &Site, form: Form, parameters: usize, replaced: usize) -> Self {
        Self {
            path: site.path.clone(),
            kind: site.kind,
            layer: site.layer,
            shape: (site.weight.rows(), site.weight.cols()),
            form,
            parameters,
            replaced,
            shared: 0,
            pair: None,
        }
    }

    /// The trained sites of a model with an adapter attached, in the model's order.
    pub fn of_adapter(model: &dyn Model, adapter: &Adapter) -> Vec<Self> {
        let mut trained: Vec<Self> = vec![];
        for site in model.sites().into_iter().filter(|site| site.is_trained()) {
            let prefix = format!("{}.", site.path);
            let own = |p: &&Parameter| p.name().starts_with(&prefix);
            let own: Vec<&Parameter> = adapter.parameters.iter().filter(own).collect();
            let form = match own.is_empty() {
                false => form(site, &own, adapter),
                // A tied head trains as its embedding does.
                true => trained
                    .iter()
                    .find(|t| Some(&t.path) == site.tied_to.as_ref())
                    .map_or(Form::Whole, |t| t.form),
            };
            let parameters: usize = own.iter().map(|p| p.count()).sum();
            let replaced = match form {
                Form::LowRank { .. } | Form::Adapted => bias_count(&own),
                Form::Whole | Form::Rows(_) | Form::Bias => parameters,
            };
            let pair = adapter.pairs.iter().find(|pair| pair.site == site.path);
            trained.push(Self {
                pair: pair.map(|pair| PairShape::of(pair, &adapter.parameters)),
                ..Self::new(site, form, parameters, replaced)
            });
        }
        let is_adapted = |site: &&mut Self| adapter.sites.contains(&site.path);
        if let Some(first) = trained.iter_mut().find(is_adapted) {
            first.shared = adapter.fixed.iter().map(Parameter::count).sum();
        }
        trained
    }

    /// The trained sites of a model of which every weight and bias trains, before anything is
    /// attached: the trained copies are as large as the model.
    pub fn whole_model(model: &dyn Model) -> Vec<Self> {
        let values = |site: &Site| {
            let bias = site.bias.as_ref().map_or(0, |b| b.cols());
            site.weight.rows() * site.weight.cols() + bias
        };
        let trained = |site: &Site| {
            let count = match site.tied_to {
                Some(_) => 0,
                None => values(site),
            };
            Self::new(site, Form::Whole, count, count)
        };
        model.sites().into_iter().map(trained).collect()
    }
}

fn form(site: &Site, own: &[&Parameter], adapter: &Adapter) -> Form {
    let weight = format!("{}.weight", site.path);
    if own.iter().any(|p| p.name() == weight) {
        return Form::Whole;
    }
    if adapter.sites.contains(&site.path) {
        let config = &adapter.config;
        return match adapter.method.reads.contains(&Common::Rank) {
            // Patterns that do not parse are refused before anything is attached.
            true => Form::LowRank {
                rank: config.rank_at(&site.path).unwrap_or(config.rank),
            },
            false => Form::Adapted,
        };
    }
    match own.iter().find(|p| p.shape().len() == 2) {
        Some(rows) => Form::Rows(rows.shape().first().copied().unwrap_or(0)),
        None => Form::Bias,
    }
}

fn bias_count(own: &[&Parameter]) -> usize {
    let biases = own.iter().filter(|p| p.name().ends_with(".bias"));
    biases.map(|p| p.count()).sum()
}

/// A trained site and what it takes beside its trained values.
pub(super) type Costed<'a> = (&'a TrainedSite, Cost);

/// What the trained sites take, as the method of the draft says.
pub(super) fn costs<'a>(draft: &Draft<'a>) -> Result<Vec<Costed<'a>>, PeftError> {
    let method = methods::find(&draft.adapter.method)?;
    let sites = draft.model.sites();
    let at = |path: &str| sites.iter().find(|site| site.path == path);
    let cost = |site: &TrainedSite| match (site.form, at(&site.path)) {
        (Form::Whole, _) => Ok(Cost::OF_WEIGHT),
        (Form::LowRank { .. } | Form::Adapted, Some(at)) => (method.cost)(draft.adapter, at),
        (_, _) => Ok(Cost::NOTHING),
    };
    let trained = draft.trained.iter();
    trained
        .map(|site| cost(site).map(|cost| (site, cost)))
        .collect()
}

/// The first layer with something to train, 0 if the embedding trains; the number of layers if
/// there is none.
pub(super) fn lowest_layer(trained: &[TrainedSite], layers: usize) -> usize {
    if trains_embedding(trained) {
        return 0;
    }
    let trained = trained.iter().filter_map(|site| site.layer);
    trained.min().unwrap_or(layers)
}

/// Whether the input of the first layer wants a gradient.
pub(super) fn trains_embedding(trained: &[TrainedSite]) -> bool {
    trained.iter().any(|site| site.kind == SiteKind::Embedding)
}

/// Trained sites of one name, shape and form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteGroup {
    /// Last part of their paths.
    pub name: String,
    /// `(d_out, d_in)` of their weights.
    pub shape: (usize, usize),
    /// How they train.
    pub form: Form,
    /// Whether they belong to layers, one of them to each.
    pub in_layers: bool,
    /// Number of sites.
    pub sites: usize,
    /// Trained values of all of them.
    pub parameters: usize,
}

impl SiteGroup {
    /// Groups sites in the order in which the groups come first; those that share another site's
    /// tensor are left out.
    pub(super) fn of(trained: &[TrainedSite]) -> Vec<Self> {
        let mut groups: Vec<Self> = vec![];
        for site in trained.iter().filter(|site| site.parameters > 0) {
            let same = |g: &&mut Self| {
                let in_layers = site.layer.is_some();
                let is = (g.name.as_str(), g.shape, g.form, g.in_layers);
                is == (site.name(), site.shape, site.form, in_layers)
            };
            match groups.iter_mut().find(same) {
                Some(group) => {
                    group.sites += 1;
                    group.parameters += site.parameters;
                }
                None => groups.push(Self {
                    name: site.name().to_owned(),
                    shape: site.shape,
                    form: site.form,
                    in_layers: site.layer.is_some(),
                    sites: 1,
                    parameters: site.parameters,
                }),
            }
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use tangent_peft::{SettingValue, attach};

    use super::super::fixture;
    use super::*;

    #[test]
    fn full_fine_tuning_is_told_without_attaching() {
        for base in ["llama/tied_gqa", "llama/everything"] {
            let mut model = fixture::model(base);
            let told = TrainedSite::whole_model(&*model);
            let adapter = attach(&mut *model, &fixture::full(), 1).unwrap();
            assert_eq!(told, TrainedSite::of_adapter(&*model, &adapter), "{base}");
            let count: usize = told.iter().map(|site| site.parameters).sum();
            assert_eq!(count, adapter.count());
            let own = told.iter().filter(|site| site.parameters > 0);
            let own: Vec<String> = own.map(|site| site.path.clone()).collect();
            assert_eq!(own, adapter.sites);
        }
    }

    #[test]
    fn low_rank_sites_are_grouped_over_layers() {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, adapter) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
        let groups = SiteGroup::of(&trained);
        assert_eq!(groups.len(), 7);
        let q = &groups[0];
        assert_eq!((q.name.as_str(), q.shape, q.sites), ("q_proj", (32, 32), 2));
        assert_eq!(q.form, Form::LowRank { rank: 4 });
        assert_eq!(q.parameters, 2 * 4 * (32 + 32));
        let count: usize = groups.iter().map(|group| group.parameters).sum();
        assert_eq!(count, adapter.count());
        assert_eq!(lowest_layer(&trained, 2), 0);
        assert!(trained.iter().all(|site| site.replaced == 0));
    }

    #[test]
    fn other_forms_are_told_from_the_tensors() {
        let mut model = fixture::model("llama/tied_gqa");
        let config = tangent_peft::AdapterConfig {
            modules_to_save: vec!["model.norm".into()],
            trainable_tokens: [("embed_tokens".to_owned(), vec![3, 5])].into(),
            ..fixture::lora(&["model.layers.1.*q_proj"])
        };
        let (trained, adapter) = fixture::attached(&mut *model, &config);
        let told: Vec<(&str, Form, usize)> = trained
            .iter()
            .map(|site| (site.name(), site.form, site.replaced))
            .collect();
        let want = [
            ("embed_tokens", Form::Rows(2), 2 * 32),
            ("q_proj", Form::LowRank { rank: 4 }, 0),
            ("norm", Form::Whole, 32),
            ("lm_head", Form::Rows(2), 0),
        ];
        assert_eq!(told, want);
        let count: usize = trained.iter().map(|site| site.parameters).sum();
        assert_eq!(count, adapter.count());
    }

    #[test]
    fn every_method_has_its_form() {
        for method in tangent_peft::METHODS {
            let mut model = fixture::model("llama/tied_gqa");
            let config = tangent_peft::AdapterConfig {
                method: method.id.into(),
                ..match method.whole_model {
                    true => fixture::full(),
                    false => fixture::lora(&["q_proj", "down_proj"]),
                }
            };
            let own = [("oft_block_size".to_owned(), SettingValue::Number(8.0))];
            let config = tangent_peft::AdapterConfig {
                own: match method.id {
                    "oft" => own.into(),
                    _ => config.own,
                },
                ..config
            };
            let (trained, adapter) = fixture::attached(&mut *model, &config);
            let want = match method.id {
                "full" => Form::Whole,
                "oft" => Form::Adapted,
                _ => Form::LowRank { rank: 4 },
            };
            let of_method = trained.iter().filter(|s| adapter.sites.contains(&s.path));
            assert!(of_method.clone().count() > 0);
            assert!(of_method.clone().all(|s| s.form == want), "{}", method.id);
            // VeRA's projections, (4, 48) and (32, 4).
            let shared: usize = trained.iter().map(|site| site.shared).sum();
            let want = if method.id == "vera" {
                4 * 48 + 32 * 4
            } else {
                0
            };
            assert_eq!(shared, want, "{}", method.id);
            let count: usize = trained.iter().map(|site| site.parameters).sum();
            assert_eq!(count, adapter.count());
        }
    }
}
