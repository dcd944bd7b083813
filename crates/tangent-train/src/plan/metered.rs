//! What the meter keeps of a step beside all else.

use tangent_model::SiteKind;

use super::{Form, TrainedSite};
use crate::config::TrainConfig;

/// Values of the gradients of weights that the meter keeps until a step is done. With one
/// micro-batch, those of sites with two factors are reduced one by one, and the largest counts.
pub(super) fn values(trained: &[TrainedSite], config: &TrainConfig, several: bool) -> u64 {
    if config.meter_every == 0 {
        return 0;
    }
    let measured = |site: &&TrainedSite| match site.kind {
        SiteKind::Linear => site.parameters > 0,
        // The loss goes around a head that trains itself.
        SiteKind::Head => site.parameters > 0 && site.form != Form::Whole,
        SiteKind::Embedding | SiteKind::Norm => false,
    };
    let matrices = trained.iter().filter(measured);
    let (mut kept, mut largest) = (0, 0);
    for site in matrices {
        let (rows, cols) = site.shape;
        let own = site.parameters - site.replaced.min(site.parameters);
        let factors = matches!(site.form, Form::LowRank { rank } if own == rank * (rows + cols));
        largest = largest.max(rows * cols);
        kept += if factors && !several { 0 } else { rows * cols };
    }
    // The one that is being formed.
    (kept + largest) as u64
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;

    #[test]
    fn gradients_are_kept_that_cannot_be_reduced() {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
        let metered = TrainConfig {
            meter_every: 10,
            ..TrainConfig::default()
        };
        // q and o, k and v, three of the feed-forward, in two layers.
        let all = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48);
        assert_eq!(values(&trained, &metered, false), 32 * 48);
        assert_eq!(values(&trained, &metered, true), all + 32 * 48);
        assert_eq!(values(&trained, &TrainConfig::default(), true), 0);
        let whole = TrainedSite::whole_model(&*model);
        assert_eq!(values(&whole, &metered, false), all + 32 * 48);
        let (head, _) = fixture::attached(&mut *model, &fixture::lora(&["lm_head"]));
        assert_eq!(values(&head, &metered, false), 96 * 32);
    }
}
