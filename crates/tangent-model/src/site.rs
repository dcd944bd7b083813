//! Sites: the places of a model where an adapter may attach. A model owns its sites and knows no
//! method; an adapter sees a site and knows no family.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_ops::{FrozenMatrix, Head, LowRank, MonarchShape, NormedLinear, StoredType, Tap};

use crate::error::ModelError;
use crate::parameter::Parameter;
use crate::pass::Pass;

/// What a site's weight is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SiteKind {
    /// A linear map inside a layer, weight `(d_out, d_in)`.
    Linear,
    /// The output head, weight `(vocabulary, d)`.
    Head,
    /// A table of token embeddings, weight `(vocabulary, d)`.
    Embedding,
    /// The scale of a normalization, weight `(1, d)`.
    Norm,
}

/// What an adapter adds to a frozen linear map.
pub enum Beside {
    /// Nothing.
    Nothing,
    /// A product of two factors.
    Product(Box<LowRank>),
    /// Something else, or it does not only add.
    Other,
}

/// Trained numbers with two vectors each, which an adapter adds to a weight `(d_out, d_in)` as
/// `scaling B diag(e) A`.
pub struct Triplets<'a> {
    /// `(rank, d_in)`.
    pub a: &'a Parameter,
    /// `(rank)`.
    pub e: &'a Parameter,
    /// `(d_out, rank)`.
    pub b: &'a Parameter,
    /// What multiplies the product.
    pub scaling: f32,
}

/// How the parameters at a site move its weight, where more is known of that than the definition
/// says: the meter then needs no derivatives of it. Parameters are row-major.
pub enum Tangent<'a> {
    /// `W' = W + scaling B diag(e) A`.
    Triplets(Triplets<'a>),
    /// `W' = diag(l) W`, or `W' = W diag(l)`.
    Scales {
        /// `l`, as many as the weight has outputs or inputs.
        vector: &'a Parameter,
        /// Whether it scales inputs.
        of_inputs: bool,
    },
    /// `W' = W + diag(b) B diag(d) A` with constant A and B, which may be larger than the site: its
    /// own are the first columns of A and the first rows of B.
    Vectors {
        /// `d: (rank)`.
        inner: &'a Parameter,
        /// `b: (d_out)`.
        outer: &'a Parameter,
        /// `A: (rank, d_in or more)`.
        a: &'a Parameter,
        /// `B: (d_out or more, rank)`.
        b: &'a Parameter,
    },
    /// `W' = W + scaling F (x) S`, a Kronecker product.
    Kronecker {
        /// `F: (l, m)`.
        first: KroneckerFactor<'a>,
        /// `S: (d_out / l, d_in / m)`.
        second: KroneckerFactor<'a>,
        /// What multiplies the product.
        scaling: f32,
    },
    /// `W' = W + M`, a Monarch matrix.
    Monarch {
        /// The first factor, block below block.
        first: &'a Parameter,
        /// The second factor, block below block.
        second: &'a Parameter,
        /// How they are cut into blocks.
        shape: MonarchShape,
    },
}

/// A factor of a Kronecker product.
#[derive(Clone, Copy)]
pub enum KroneckerFactor<'a> {
    /// A matrix.
    Whole(&'a Parameter),
    /// `A B` for `A: (rows, rank)` and `B: (rank, cols)`.
    Product(&'a Parameter, &'a Parameter),
}

impl<'a> KroneckerFactor<'a> {
    /// What it is made of.
    pub fn parameters(self) -> Vec<&'a Parameter> {
        match self {
            Self::Whole(matrix) => vec![matrix],
            Self::Product(a, b) => vec![a, b],
        }
    }
}

impl<'a> Tangent<'a> {
    /// All that moves the weight, as the variants name it.
    pub fn parameters(&self) -> Vec<&'a Parameter> {
        match *self {
            Self::Triplets(Triplets { a, e, b, .. }) => vec![a, e, b],
            Self::Scales { vector, .. } => vec![vector],
            Self::Vectors { inner, outer, .. } => vec![inner, outer],
            Self::Kronecker { first, second, .. } => {
                [first.parameters(), second.parameters()].concat()
            }
            Self::Monarch { first, second, .. } => vec![first, second],
        }
    }
}

/// What an adapter does at a site with a weight: its definition, and fast paths held to it.
pub trait WeightAdapter: Send + Sync {
    /// The definition: the effective weight as a function of the frozen one.
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2>;

    /// `x W'^T` for a linear site.
    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        tangent_ops::linear(x, self.weight(dense(base, pass), pass))
    }

    /// `(silu(gate) * up) W'^T` for a linear site.
    fn gated_linear(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        base: &FrozenMatrix,
        pass: &Pass,
    ) -> Tensor<2> {
        self.linear(tangent_ops::swiglu(gate, up), base, pass)
    }

    /// Rows `ids` of `W'` for an embedding site.
    fn embed(&self, ids: &Arc<[u32]>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        tangent_ops::embedding(ids, self.weight(dense(base, pass), pass))
    }

    /// The effective bias, `(1, d_out)`, as a function of the one that is there.
    fn bias(&self, bias: Option<Tensor<2>>, _pass: &Pass) -> Option<Tensor<2>> {
        bias
    }

    /// Whether the definition adds to the frozen weight something that does not depend on it, so
    /// that it can be taken out of a merged weight again.
    fn is_additive(&self) -> bool {
        false
    }

    /// What the definition adds to the frozen weight, exactly, where the parameters give it as a
    /// product of two factors.
    fn low_rank(&self, _pass: &Pass) -> Option<LowRank> {
        None
    }

    /// What [`linear`](Self::linear) adds to the frozen map in this pass, so that maps of one input
    /// can be computed together.
    fn beside(&self, _pass: &Pass) -> Beside {
        Beside::Other
    }

    /// The frozen weight of which the definition makes `effective`; `None` where that does not
    /// tell it.
    fn inverse(&self, effective: Tensor<2>, pass: &Pass) -> Option<Tensor<2>> {
        if !self.is_additive() {
            return None;
        }
        let moved = self.weight(effective.clone(), pass);
        Some(effective.clone() - (moved - effective))
    }

    /// The bias of which [`bias`](Self::bias) makes `effective`, where there is an
    /// [`inverse`](Self::inverse).
    fn inverse_bias(&self, effective: Option<Tensor<2>>, _pass: &Pass) -> Option<Tensor<2>> {
        effective
    }

    /// The effective weight where it is a trained tensor of its own and no function of the
    /// frozen one, so that the head's loss can use it directly.
    fn replacement(&self, _pass: &Pass) -> Option<Tensor<2>> {
        None
    }

    /// How the parameters move the weight, where the definition is one of these.
    fn tangent(&self) -> Option<Tangent<'_>> {
        None
    }

    /// The trained lengths `m: (d_out)` of the rows, where the definition is
    /// `W'_i = m_i V_i / |V_i|` and V is what the site's pair of factors alone would make of the
    /// frozen weight.
    fn magnitudes(&self) -> Option<&Parameter> {
        None
    }

    /// What the site's pair of factors adds to the frozen weight to make V, where there are
    /// [`magnitudes`](Self::magnitudes).
    fn row_product(&self, _pass: &Pass) -> Option<LowRank> {
        None
    }
}

/// The frozen weight as a dense constant.
pub fn dense(base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
    base.dense(&pass.device)
}

/// Reads a weight as it was before it was quantized. It is not held meanwhile.
pub type Original = Arc<dyn Fn() -> Result<FrozenMatrix, ModelError> + Send + Sync>;

/// One place in the model: a frozen weight, perhaps a bias, and at most one adapter.
pub struct Site {
    /// Path of the module in Hugging Face's naming, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// What the weight is used for.
    pub kind: SiteKind,
    /// The layer that the site belongs to.
    pub layer: Option<usize>,
    /// The frozen weight.
    pub weight: FrozenMatrix,
    /// What the weight was quantized from, where that was done when the model was opened or since.
    pub original: Option<Original>,
    /// The type in which the model's file holds the weight, where it was quantized when the model was
    /// opened.
    pub quantized_from: Option<StoredType>,
    /// The frozen bias, `(1, d_out)`.
    pub bias: Option<FrozenMatrix>,
    /// Path of the site whose weight this one shares (a tied head).
    pub tied_to: Option<String>,
    adapter: Option<Arc<dyn WeightAdapter>>,
    trained_bias: Option<Parameter>,
    /// What [`rebase`](Self::rebase) replaced.
    replaced: Option<Box<(FrozenMatrix, Option<Original>)>>,
}

impl std::fmt::Debug for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Site")
            .field("path", &self.path)
            .field("kind", &self.kind)
            .field("adapted", &self.is_adapted())
            .finish_non_exhaustive()
    }
}

impl Site {
    /// A site without an adapter.
    pub fn new(path: String, kind: SiteKind, layer: Option<usize>, weight: FrozenMatrix) -> Self {
        Self {
            path,
            kind,
            layer,
            weight,
            original: None,
            quantized_from: None,
            bias: None,
            tied_to: None,
            adapter: None,
            trained_bias: None,
            replaced: None,
        }
    }

    /// Attaches an adapter in the place of any earlier one.
    pub fn attach(&mut self, adapter: Arc<dyn WeightAdapter>) {
        self.adapter = Some(adapter);
    }

    /// Trains the bias in place.
    pub fn attach_bias(&mut self, bias: Parameter) {
        self.trained_bias = Some(bias);
    }

    /// Puts another frozen weight in the place of this one, which comes back when the site is
    /// detached; `original` reads what the new one was quantized from.
    pub fn rebase(&mut self, weight: FrozenMatrix, original: Original) {
        let held = std::mem::replace(&mut self.weight, weight);
        let before = self.original.replace(original);
        self.replaced
            .get_or_insert_with(|| Box::new((held, before)));
    }

    /// The weight that was put in the place of another one, with what it was quantized from; none
    /// if the weight is the model's.
    pub fn rebased(&self) -> Option<(FrozenMatrix, Original)> {
        let original = self.original.clone();
        let here = self.replaced.is_some().then(|| self.weight.clone());
        here.zip(original)
    }

    /// Removes whatever is attached. The frozen weight is the model's again.
    pub fn detach(&mut self) {
        self.adapter = None;
        self.trained_bias = None;
        if let Some(replaced) = self.replaced.take() {
            (self.weight, self.original) = *replaced;
        }
    }

    /// The attached adapter.
    pub fn attached(&self) -> Option<Arc<dyn WeightAdapter>> {
        self.adapter.clone()
    }

    /// The bias that trains in place.
    pub fn attached_bias(&self) -> Option<Parameter> {
        self.trained_bias.clone()
    }

    /// Whether anything of this site trains.
    pub fn is_trained(&self) -> bool {
        self.adapter.is_some() || self.trained_bias.is_some()
    }

    /// Whether something is attached to the weight.
    pub fn is_adapted(&self) -> bool {
        self.adapter.is_some()
    }

    /// Whether this site and `other` have one and the same adapter, or neither has one.
    pub fn shares_adapter_with(&self, other: Option<&Self>) -> bool {
        match (&self.adapter, other.and_then(|o| o.adapter.as_ref())) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// Whether the attached adapter can be taken out of this site, into which it was merged: true
    /// without one.
    pub fn is_removable(&self, pass: &Pass) -> bool {
        let inverts = |adapter: &Arc<dyn WeightAdapter>| {
            adapter.is_additive() || adapter.inverse(dense(&self.weight, pass), pass).is_some()
        };
        self.trained_bias.is_none() && self.adapter.as_ref().is_none_or(inverts)
    }

    /// The weight without the attached adapter, which was merged into it; `None` where it cannot
    /// be told.
    pub fn weight_without(&self, pass: &Pass) -> Option<Tensor<2>> {
        let merged = dense(&self.weight, pass);
        match &self.adapter {
            Some(adapter) => adapter.inverse(merged, pass),
            None => Some(merged),
        }
    }

    /// The bias without the attached adapter, which was merged into it, `(1, d_out)`.
    pub fn bias_without(&self, pass: &Pass) -> Option<Tensor<2>> {
        let merged = self.bias.as_ref().map(|bias| dense(bias, pass));
        match &self.adapter {
            Some(adapter) => adapter.inverse_bias(merged, pass),
            None => merged,
        }
    }

    /// The effective weight, by the adapter's definition.
    pub fn effective_weight(&self, pass: &Pass) -> Tensor<2> {
        self.effective_weight_on(&self.weight, pass)
    }

    /// What [`Site::effective_weight`] is with another frozen weight of the same shape.
    pub fn effective_weight_on(&self, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        let base = dense(base, pass);
        match &self.adapter {
            Some(adapter) => adapter.weight(base, pass),
            None => base,
        }
    }

    /// The effective bias, `(1, d_out)`.
    pub fn effective_bias(&self, pass: &Pass) -> Option<Tensor<2>> {
        let bias = match (&self.trained_bias, &self.bias) {
            (Some(trained), _) => Some(pass.value(trained)),
            (None, Some(frozen)) => Some(dense(frozen, pass)),
            (None, None) => None,
        };
        self.effective_bias_on(bias, pass)
    }

    /// What [`Site::effective_bias`] is with another bias, `(1, d_out)`.
    pub fn effective_bias_on(&self, bias: Option<Tensor<2>>, pass: &Pass) -> Option<Tensor<2>> {
        match &self.adapter {
            Some(adapter) => adapter.bias(bias, pass),
            None => bias,
        }
    }

    /// `x W^T + b` for linear sites and heads.
    pub fn linear(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let tap = self.tap(pass).map(|tap| (tap, x.clone()));
        let mut y = match &self.adapter {
            Some(adapter) => adapter.linear(x, &self.weight, &pass.at(&self.path)),
            None => tangent_ops::frozen_linear(x, &self.weight),
        };
        if let Some((tap, x)) = tap {
            y = tangent_ops::tap(x, y, tap, &self.path);
        }
        self.biased(y, pass)
    }

    /// Who is told of this site in this pass.
    fn tap(&self, pass: &Pass) -> Option<Arc<dyn Tap>> {
        pass.tap.clone().filter(|tap| tap.wants(&self.path))
    }

    /// The map of [`linear`](Self::linear) before its bias, as one of several of one input; `None`
    /// where an adapter does more than add a product.
    pub(crate) fn map(&self, pass: &Pass) -> Option<NormedLinear<'_>> {
        let adapter = self.adapter.as_ref();
        let product = match adapter.map(|adapter| adapter.beside(&pass.at(&self.path))) {
            None | Some(Beside::Nothing) => None,
            Some(Beside::Product(product)) => Some(*product),
            Some(Beside::Other) => return None,
        };
        Some(NormedLinear {
            weight: &self.weight,
            product,
            tap: self.tap(pass).map(|tap| (tap, &self.path[..])),
        })
    }

    /// `(silu(gate) * up) W^T + b` for linear sites.
    pub fn gated_linear(&self, gate: Tensor<2>, up: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let Some(adapter) = &self.adapter else {
            return self.linear(tangent_ops::swiglu(gate, up), pass);
        };
        let tap = self.tap(pass);
        let tap = tap.map(|tap| (tap, gate.clone(), up.clone()));
        let mut y = adapter.gated_linear(gate, up, &self.weight, &pass.at(&self.path));
        if let Some((tap, gate, up)) = tap {
            y = tangent_ops::gated_tap(gate, up, y, tap, &self.path);
        }
        self.biased(y, pass)
    }

    /// `y` with the site's bias, if it has one.
    pub(crate) fn biased(&self, y: Tensor<2>, pass: &Pass) -> Tensor<2> {
        match self.effective_bias(pass) {
            Some(bias) => y + bias,
            None => y,
        }
    }

    /// Rows `ids` of an embedding site.
    pub fn embed(&self, ids: &Arc<[u32]>, pass: &Pass) -> Tensor<2> {
        match &self.adapter {
            Some(adapter) => adapter.embed(ids, &self.weight, &pass.at(&self.path)),
            None => tangent_ops::frozen_embedding(ids, &self.weight, &pass.device),
        }
    }

    /// Root-mean-square normalization with this site's scale.
    pub fn rms_norm(&self, x: Tensor<2>, eps: f32, pass: &Pass) -> Tensor<2> {
        tangent_ops::rms_norm(x, self.effective_weight(pass), eps)
    }

    /// The head's weight in the form that the fused loss takes; `None` if an adapter computes
    /// the logits in its own way.
    pub(crate) fn head(&self, pass: &Pass) -> Option<Head> {
        match &self.adapter {
            None => Some(Head::Frozen(self.weight.clone())),
            Some(adapter) => adapter.replacement(pass).map(Head::Trained),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(value: f32) -> FrozenMatrix {
        FrozenMatrix::from_values(vec![value; 6], 2, 3)
    }

    #[test]
    fn a_weight_comes_back_when_the_site_is_detached() {
        let original = |value: f32| -> Original { Arc::new(move || Ok(weight(value))) };
        let read = |site: &Site| site.original.as_ref().unwrap()().unwrap().to_values();
        let mut site = Site::new("q_proj".into(), SiteKind::Linear, Some(0), weight(1.0));
        site.original = Some(original(2.0));
        assert!(site.rebased().is_none());
        for other in [3.0, 5.0] {
            site.rebase(weight(other), original(other + 1.0));
            let (here, from) = site.rebased().unwrap();
            assert_eq!(here.to_values(), [other; 6]);
            assert_eq!(from().unwrap().to_values(), [other + 1.0; 6]);
            assert_eq!(site.weight.to_values(), [other; 6]);
            assert_eq!(read(&site), [other + 1.0; 6]);
        }
        site.detach();
        assert_eq!(
            (site.weight.to_values(), read(&site)),
            (vec![1.0; 6], vec![2.0; 6])
        );
        assert!(site.rebased().is_none());
        // A weight without an original gets that back, too.
        site.original = None;
        site.rebase(weight(3.0), original(4.0));
        site.detach();
        assert!(site.original.is_none());
    }
}
