//! What methods attach to a model, put together: which of them go together, and where it goes.

use std::collections::BTreeMap;
use std::sync::Arc;

use tangent_model::family::Model;
use tangent_model::{
    ActivationAdapter, Original, Parameter, PrefixAdapter, RowStates, SideAdapter, Site, SiteKind,
    WeightAdapter,
};
use tangent_ops::FrozenMatrix;

use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::methods::{self, Attach, Method};

/// What will be attached to one site.
#[derive(Clone, Default)]
pub(super) struct Attachment {
    /// In the place of its weight.
    pub adapter: Option<Arc<dyn WeightAdapter>>,
    /// In the place of its bias.
    pub bias: Option<Parameter>,
    /// The frozen weight below the adapter where that is not the model's, with what it was
    /// quantized from.
    pub base: Option<(FrozenMatrix, Original)>,
}

/// What will be attached to sites, by their paths.
pub(super) type SiteAttachments = BTreeMap<String, Attachment>;

/// What will be attached to a model.
#[derive(Default)]
pub(super) struct Attachments {
    /// To sites; nothing to those that are not there.
    pub sites: SiteAttachments,
    /// To sub-layers, by their paths.
    pub sublayers: BTreeMap<String, Arc<dyn ActivationAdapter>>,
    /// Before every row.
    pub prefix: Option<Arc<dyn PrefixAdapter>>,
    /// Beside the layers.
    pub side: Option<Arc<dyn SideAdapter>>,
    /// Hidden states that the network beside the layers need not wait for.
    pub known_states: Option<Arc<dyn RowStates>>,
}

impl Attachment {
    fn is_empty(&self) -> bool {
        self.adapter.is_none() && self.bias.is_none()
    }
}

impl Attachments {
    /// Why this and what another method attaches do not go together; `sites` are the model's.
    pub fn conflict(&self, other: &Self, sites: &[&Site]) -> Option<String> {
        for (path, theirs) in &other.sites {
            let Some(own) = self.sites.get(path) else {
                continue;
            };
            for (what, twice) in [
                ("weight", own.adapter.is_some() && theirs.adapter.is_some()),
                ("bias", own.bias.is_some() && theirs.bias.is_some()),
            ] {
                if twice {
                    return Some(format!(
                        "both change the {what} of {path}; leave it to one of them"
                    ));
                }
            }
        }
        let twice = |path: &&String| other.sublayers.contains_key(*path);
        if let Some(path) = self.sublayers.keys().find(twice) {
            return Some(format!(
                "both change the output of {path}; leave it to one of them"
            ));
        }
        let beside =
            |side: &Self, layers: &Self| layers.without_gradient(&**side.side.as_ref()?, sites);
        let what = beside(self, other).or_else(|| beside(other, self))?;
        Some(format!(
            "no gradient reaches {what}: the layers run without one, beside the network that reads \
             their hidden states; adapt nothing but the head, or leave one of them out"
        ))
    }

    /// What of this could not train beside `side`; `sites` are the model's.
    fn without_gradient(&self, side: &dyn SideAdapter, sites: &[&Site]) -> Option<String> {
        if self.prefix.is_some() {
            return Some("virtual tokens".to_owned());
        }
        if let Some(path) = self.sublayers.keys().next() {
            return Some(path.clone());
        }
        let is_reached = |site: &Site| match site.kind {
            SiteKind::Head => true,
            SiteKind::Norm => site.layer.is_none() && side.normalized_by_model(),
            SiteKind::Linear | SiteKind::Embedding => false,
        };
        let trains = |site: &Site| self.sites.get(&site.path).is_some_and(|a| !a.is_empty());
        let mut sites = sites.iter().copied();
        let found = sites.find(|site| trains(site) && !is_reached(site));
        found.map(|site| site.path.clone())
    }

    /// Adds what another method attaches, elsewhere than this.
    pub fn join(&mut self, other: Self) {
        for (path, theirs) in other.sites {
            let own = self.sites.entry(path).or_default();
            own.adapter = own.adapter.take().or(theirs.adapter);
            own.bias = own.bias.take().or(theirs.bias);
            own.base = own.base.take().or(theirs.base);
        }
        self.sublayers.extend(other.sublayers);
        self.prefix = self.prefix.take().or(other.prefix);
        self.side = self.side.take().or(other.side);
    }

    /// Detaches everything; what was there.
    pub fn take_from(model: &mut dyn Model) -> Self {
        let mut taken = Self::default();
        for site in model.sites_mut() {
            let attachment = Attachment {
                adapter: site.attached(),
                bias: site.attached_bias(),
                base: site.rebased(),
            };
            taken.sites.insert(site.path.clone(), attachment);
            site.detach();
        }
        for sublayer in model.sublayers_mut() {
            if let Some(adapter) = sublayer.attached() {
                taken
                    .sublayers
                    .insert(sublayer.path.clone(), adapter.clone());
            }
            sublayer.detach();
        }
        let whole = model.whole_mut();
        taken.prefix = whole.prefix.take();
        taken.side = whole.side.take();
        taken.known_states = whole.known_states.take();
        taken
    }

    /// Attaches everything, in the place of what was there.
    pub fn put_into(mut self, model: &mut dyn Model) {
        for site in model.sites_mut() {
            site.detach();
            let attachment = self.sites.remove(&site.path).unwrap_or_default();
            if let Some((weight, original)) = attachment.base {
                site.rebase(weight, original);
            }
            if let Some(adapter) = attachment.adapter {
                site.attach(adapter);
            }
            if let Some(bias) = attachment.bias {
                site.attach_bias(bias);
            }
        }
        for sublayer in model.sublayers_mut() {
            sublayer.detach();
            if let Some(adapter) = self.sublayers.remove(&sublayer.path) {
                sublayer.attach(adapter);
            }
        }
        let whole = model.whole_mut();
        (whole.prefix, whole.side) = (self.prefix, self.side);
        whole.known_states = self.known_states;
    }
}

/// Refuses methods that cannot train together, whatever the model is.
///
/// # Errors
/// Naming the first two, and why.
pub fn check_combination(configs: &[AdapterConfig]) -> Result<(), PeftError> {
    let methods = configs.iter().map(|config| methods::find(&config.method));
    let methods = methods.collect::<Result<Vec<&Method>, PeftError>>()?;
    for (index, second) in methods.iter().enumerate() {
        for first in methods.iter().take(index) {
            if let Some(why) = never(first, second) {
                return Err(PeftError::Combination {
                    first: first.id,
                    second: second.id,
                    why: why.to_owned(),
                });
            }
        }
    }
    Ok(())
}

/// Why two methods train together on no model.
fn never(first: &Method, second: &Method) -> Option<&'static str> {
    if first.whole_model || second.whole_model {
        return Some(
            "every weight of the model trains, so nothing is left for the other one, and the \
             result is a model and no adapter; keep one of them",
        );
    }
    match (first.attach, second.attach) {
        (Attach::Prefix(_), Attach::Prefix(_)) => {
            Some("both put virtual tokens before every row; keep one of them")
        }
        (Attach::Side(_), Attach::Side(_)) => {
            Some("both put a network beside the layers; keep one of them")
        }
        _ if first.id == second.id => Some(
            "an adapter has one part of each method; give it once, with all modules that it adapts",
        ),
        _ => None,
    }
}
