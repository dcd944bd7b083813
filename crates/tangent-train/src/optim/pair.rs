//! What a rule sees of two factors of which a loss depends through their scaled product alone.
//!
//! ```text
//! V = W + s B A        G_A = s B^T dL/dV        G_B = s dL/dV A^T
//! ```
//!
//! Rules compute with V, A and B; all that they say of "the weight" is true of V. For LoRA V is the
//! effective weight. For DoRA, `W' = diag(m / |V|) V`, it is the matrix whose rows give directions:
//! there `dL/dV` is what full fine-tuning of V with the same lengths m would follow, and the lengths
//! themselves are outside of the pair.

use tangent_model::Parameter;
use tangent_peft::Pair;

use super::Hyper;

/// Sizes of a pair `a: (rank, d_in)`, `b: (d_out, rank)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairShape {
    /// Output features of the weight.
    pub d_out: usize,
    /// Input features of the weight.
    pub d_in: usize,
    /// The thin side of both factors.
    pub rank: usize,
}

impl PairShape {
    /// Sizes of an adapter's pair; `parameters` are the adapter's.
    ///
    /// # Panics
    /// If the pair is of another adapter.
    pub fn of(pair: &Pair, parameters: &[Parameter]) -> Self {
        match (parameters[pair.a].shape(), parameters[pair.b].shape()) {
            (&[rank, d_in], &[d_out, width]) if rank == width => Self { d_out, d_in, rank },
            other => unreachable!("{}: two factors, not {other:?}", pair.site),
        }
    }

    /// Values of A.
    pub fn a(self) -> usize {
        self.rank * self.d_in
    }

    /// Values of B.
    pub fn b(self) -> usize {
        self.d_out * self.rank
    }

    /// Values of a square matrix as large as the rank.
    pub fn square(self) -> usize {
        self.rank * self.rank
    }

    /// Values of the weight.
    pub fn weight(self) -> usize {
        self.d_out * self.d_in
    }
}

/// A state vector of a pair.
pub struct PairSlot {
    /// Name, unique in the rule.
    pub name: &'static str,
    /// Number of values.
    pub len: fn(PairShape) -> usize,
}

/// How a rule moves pairs.
pub struct PairRule {
    /// The state vectors of a pair.
    pub slots: &'static [PairSlot],
    /// A pair's part in a sum over all pairs, whose root every pair is then given as
    /// [`PairStep::norm`].
    pub squares: Option<fn(&PairView<'_>) -> f64>,
    /// Whether A and B must have the same learning rate, since only together are their steps one of
    /// the weight.
    pub one_rate: bool,
    /// Moves one pair.
    pub step: fn(&Hyper, PairStep<'_>),
}

/// A pair before its step, row-major.
pub struct PairView<'a> {
    /// A, `(rank, d_in)`.
    pub a: &'a [f32],
    /// B, `(d_out, rank)`.
    pub b: &'a [f32],
    /// Gradient of the loss by A.
    pub gradient_a: &'a [f32],
    /// Gradient of the loss by B.
    pub gradient_b: &'a [f32],
    /// Sizes.
    pub shape: PairShape,
}

/// One step of one pair, row-major.
///
/// Gradients are those after clipping by their global norm, which multiplies both of a pair, and
/// all pairs, by one number.
pub struct PairStep<'a> {
    /// A, `(rank, d_in)`, to be moved.
    pub a: &'a mut [f32],
    /// B, `(d_out, rank)`, to be moved.
    pub b: &'a mut [f32],
    /// Gradient of the loss by A.
    pub gradient_a: &'a [f32],
    /// Gradient of the loss by B.
    pub gradient_b: &'a [f32],
    /// Sizes.
    pub shape: PairShape,
    /// Scaling of the product `B A`.
    pub scaling: f32,
    /// State vectors of this pair, zero before the first step.
    pub state: &'a mut [Vec<f32>],
    /// Learning rate of A.
    pub rate_a: f32,
    /// Learning rate of B.
    pub rate_b: f32,
    /// Weight decay of both.
    pub weight_decay: f32,
    /// Root of the sum of [`PairRule::squares`] over all pairs; 0 where the rule has none.
    pub norm: f64,
    /// Number of this step, from 1.
    pub number: u64,
}
