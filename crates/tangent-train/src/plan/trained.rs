//! What trains, site by site, told without the tensors themselves.

use tangent_model::family::Model;
use tangent_model::{Parameter, Site, SiteKind};
use tangent_peft::methods::cost::Cost;
use tangent_peft::methods::{self, Common};
use tangent_peft::{Adapter, AdapterConfig, Attach, PeftError};

use super::Draft;
use super::metered::Known;
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
    /// An adapter of a sub-layer's output.
    Sublayer,
    /// So many virtual tokens before every row.
    VirtualTokens(usize),
    /// A network beside the layers.
    Side,
    /// What all adapted weights have in common.
    Shared,
}

/// Whether a method is of a kind.
type IsKind = fn(Attach) -> bool;

/// A site that trains, or what trains beside the sites.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainedSite {
    /// Path of the site or the sub-layer, or what it is.
    pub path: String,
    /// What its weight is used for; `None` of what is no weight of the model.
    pub kind: Option<SiteKind>,
    /// The layer that it belongs to.
    pub layer: Option<usize>,
    /// `(d_out, d_in)` of its weight; where it is none of the model's, that of its first matrix.
    pub shape: (usize, usize),
    /// How it trains.
    pub form: Form,
    /// Of which adapter of the run its method is: 0 is the first, others train along.
    pub part: usize,
    /// Trained values; none where the tensor is another site's (a tied head).
    pub parameters: usize,
    /// Frozen values that they take the place of.
    pub replaced: usize,
    /// Values that do not train and that all sites of the adapter share, counted at the first one.
    pub shared: usize,
    /// Sizes of the factors, where some optimizers move two of them together.
    pub pair: Option<PairShape>,
    /// What the meter takes for it, where the adapter names all that moves its weight.
    pub(super) known: Option<Known>,
}

impl TrainedSite {
    /// The last part of the path.
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }

    /// Values of each rank, lengths of rows and biases left out: those of one row and one column of
    /// the weight, or of several; `None` where ranks have no such values of their own.
    pub fn of_one_rank(&self) -> Option<usize> {
        let Form::LowRank { rank } = self.form else {
            return None;
        };
        let growing = match self.pair {
            Some(pair) => pair.a() + pair.b(),
            None => self.parameters - self.replaced.min(self.parameters),
        };
        let row_and_column = rank * (self.shape.0 + self.shape.1);
        let is_whole = growing > 0 && growing.is_multiple_of(row_and_column);
        is_whole.then(|| growing / rank)
    }

    fn new(site: &Site, form: Form, parameters: usize, replaced: usize) -> Self {
        Self {
            path: site.path.clone(),
            kind: Some(site.kind),
            layer: site.layer,
            shape: (site.weight.rows(), site.weight.cols()),
            form,
            part: 0,
            parameters,
            replaced,
            shared: 0,
            pair: None,
            known: None,
        }
    }

    /// The trained sites of a model with an adapter attached, in the model's order.
    pub fn of_adapter(model: &dyn Model, adapter: &Adapter) -> Vec<Self> {
        let mut trained: Vec<Self> = vec![];
        for site in model.sites().into_iter().filter(|site| site.is_trained()) {
            let prefix = format!("{}.", site.path);
            let own = |p: &&Parameter| p.name().starts_with(&prefix);
            let own: Vec<&Parameter> = adapter.parameters.iter().filter(own).collect();
            let part = adapter.part_at(&site.path);
            let form = match own.is_empty() && part.is_none() {
                false => form(site, &own, part.map(|(_, part)| part)),
                // A tied head trains as its embedding does.
                true => trained
                    .iter()
                    .find(|t| Some(&t.path) == site.tied_to.as_ref())
                    .map_or(Form::Whole, |t| t.form),
            };
            let parameters: usize = own.iter().map(|p| p.count()).sum();
            let replaced = match form {
                Form::Whole | Form::Rows(_) | Form::Bias => parameters,
                _ => bias_count(&own),
            };
            let pair = adapter.pairs.iter().find(|pair| pair.site == site.path);
            trained.push(Self {
                part: part.map_or(0, |(index, _)| index),
                pair: pair.map(|pair| PairShape::of(pair, &adapter.parameters)),
                known: Known::of(site, &own),
                ..Self::new(site, form, parameters, replaced)
            });
        }
        let is_adapted = |site: &&mut Self| adapter.sites.contains(&site.path);
        if let Some(first) = trained.iter_mut().find(is_adapted) {
            first.shared = adapter.fixed.iter().map(Parameter::count).sum();
        }
        trained.extend(Self::sublayers(model, adapter));
        trained.extend(Self::others(model, adapter));
        trained
    }

    /// What trains beside the sites.
    fn beside(path: &str, form: Form, tensors: &[&Parameter]) -> Self {
        let parameters = tensors.iter().map(|p| p.count()).sum();
        let mut matrices = tensors.iter().filter_map(|p| match p.shape() {
            [rows, cols] => Some((*rows, *cols)),
            _ => None,
        });
        Self {
            path: path.to_owned(),
            kind: None,
            layer: None,
            shape: matrices.next().unwrap_or((1, parameters)),
            form,
            part: 0,
            parameters,
            replaced: 0,
            shared: 0,
            pair: None,
            known: None,
        }
    }

    /// The sub-layers whose outputs are adapted.
    fn sublayers(model: &dyn Model, adapter: &Adapter) -> Vec<Self> {
        let tensors = beside_sites(model, adapter, |a| matches!(a, Attach::Activation(_)));
        let adapted = model.sublayers().into_iter().filter(|s| s.is_adapted());
        let trained = adapted.map(|sublayer| {
            let prefix = format!("{}.", sublayer.path);
            let own = tensors.iter().filter(|p| p.name().starts_with(&prefix));
            let own: Vec<&Parameter> = own.copied().collect();
            Self {
                layer: Some(sublayer.layer),
                ..Self::beside(&sublayer.path, Form::Sublayer, &own)
            }
        });
        trained.collect()
    }

    /// What belongs to no layer: virtual tokens, a network beside the layers, and what weights have
    /// in common and none of them by itself.
    fn others(model: &dyn Model, adapter: &Adapter) -> Vec<Self> {
        let virtual_tokens = Form::VirtualTokens(model.whole().virtual_tokens());
        let kinds: [(&str, Form, IsKind); 3] = [
            ("virtual_tokens", virtual_tokens, |a| {
                matches!(a, Attach::Prefix(_))
            }),
            ("side", Form::Side, |a| matches!(a, Attach::Side(_))),
            ("shared", Form::Shared, |a| matches!(a, Attach::Weight(_))),
        ];
        let found = kinds.map(|(path, form, is_kind)| {
            let tensors = beside_sites(model, adapter, is_kind);
            (!tensors.is_empty()).then(|| Self::beside(path, form, &tensors))
        });
        found.into_iter().flatten().collect()
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

/// The trained tensors of adapters of one kind that belong to no site.
fn beside_sites<'a>(
    model: &dyn Model,
    adapter: &'a Adapter,
    is_kind: fn(Attach) -> bool,
) -> Vec<&'a Parameter> {
    let sites = model.sites();
    let of_a_site = |p: &Parameter| {
        let within = |site: &&Site| p.name().strip_prefix(site.path.as_str());
        let mut rests = sites.iter().filter_map(within);
        rests.any(|rest| rest.starts_with('.'))
    };
    let parts = adapter.each().iter();
    let parts = parts.filter(|part| is_kind(part.method.attach));
    let tensors = parts.flat_map(|part| &part.parameters);
    tensors.filter(|p| !of_a_site(p)).collect()
}

/// How a site trains whose weight `adapter` adapts, if one does.
fn form(site: &Site, own: &[&Parameter], adapter: Option<&Adapter>) -> Form {
    let weight = format!("{}.weight", site.path);
    // Files of PEFT have a name of their own for a trained scale.
    let is_whole = |p: &&Parameter| p.name() == weight || site.kind == SiteKind::Norm;
    if own.iter().any(is_whole) {
        return Form::Whole;
    }
    if let Some(adapter) = adapter {
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

/// What the trained sites take, as the methods of the draft say.
pub(super) fn costs<'a>(draft: &Draft<'a>) -> Result<Vec<Costed<'a>>, PeftError> {
    let configs: Vec<&AdapterConfig> = draft.adapters().collect();
    let sites = draft.model.sites();
    let at = |path: &str| sites.iter().find(|site| site.path == path);
    let of_method = |site: &TrainedSite| -> Result<Cost, PeftError> {
        match (configs.get(site.part), at(&site.path)) {
            (Some(config), Some(at)) => (methods::find(&config.method)?.cost)(config, at),
            _ => Ok(Cost::NOTHING),
        }
    };
    let cost = |site: &TrainedSite| match site.form {
        Form::Whole => Ok(Cost::OF_WEIGHT),
        Form::LowRank { .. } | Form::Adapted => of_method(site),
        Form::Sublayer | Form::Side => Ok(Cost {
            per_token: kept_values(draft.model, site),
            // Maps that take every token once.
            trained_work: site.parameters,
            ..Cost::NOTHING
        }),
        // What gives virtual tokens is small beside layers.
        _ => Ok(Cost::NOTHING),
    };
    let trained = draft.trained.iter();
    trained
        .map(|site| cost(site).map(|cost| (site, cost)))
        .collect()
}

/// Values of a token that an adapter of a sub-layer or a network beside the layers keeps for its
/// derivative, as it says itself.
fn kept_values(model: &dyn Model, site: &TrainedSite) -> usize {
    if site.form == Form::Side {
        let side = model.whole().side.as_ref();
        return side.map_or(0, |side| side.kept());
    }
    let sublayers = model.sublayers();
    let at = sublayers.iter().find(|sublayer| sublayer.path == site.path);
    let attached = at.and_then(|sublayer| sublayer.attached());
    attached.map_or(0, |adapter| adapter.kept())
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
    let is_read_first = |site: &TrainedSite| match site.form {
        Form::VirtualTokens(_) => true,
        _ => site.kind == Some(SiteKind::Embedding),
    };
    trained.iter().any(is_read_first)
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

/// Trained linear maps in layers.
pub(super) fn linear_maps(trained: &[TrainedSite]) -> impl Iterator<Item = &TrainedSite> {
    trained.iter().filter(|s| s.kind == Some(SiteKind::Linear))
}

/// Those of them that one of the adapters gives two thin factors, which start values may fill.
pub(super) fn low_rank_maps(
    trained: &[TrainedSite],
    part: usize,
) -> impl Iterator<Item = &TrainedSite> {
    let own = linear_maps(trained).filter(move |site| site.part == part);
    own.filter(|site| matches!(site.form, Form::LowRank { .. }))
}

#[cfg(test)]
mod tests;
