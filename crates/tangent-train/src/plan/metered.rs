//! What the meter takes beside all else: gradients of weights in memory, and its work.

use tangent_model::{Parameter, Site, SiteKind, Tangent};

use super::survey::Survey;
use super::{Form, TrainedSite};
use crate::config::TrainConfig;

/// Passes over a site's weight, or as much work, where two factors and more move it: what they are
/// added to, what is left of the gradient, and a system that is solved in a few products. Scales and
/// the factors of Kronecker products and Monarch matrices take about as many.
const WITH_FACTORS: f64 = 10.0;

/// Products of the gradient with as many vectors as there are triplets: what A and B of those that
/// move span, and three sums of the step.
const WITH_TRIPLETS: usize = 5;

/// Passes by least squares: dozens of products, each of two evaluations of the weight and a
/// derivative.
const LEAST_SQUARES: f64 = 200.0;

/// What a reading takes of a site whose adapter names all that moves its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// So many multiply-adds.
    Products(usize),
    /// Some passes over the weight.
    Passes,
}

impl Known {
    /// Of a site with trained tensors of its own.
    pub fn of(site: &Site, own: &[&Parameter]) -> Option<Self> {
        let attached = site.attached()?;
        let tangent = attached.tangent()?;
        let moving = own.iter().filter(|p| !p.name().ends_with(".bias"));
        if moving.count() != tangent.parameters().len() {
            return None;
        }
        let (d_out, d_in) = (site.weight.rows(), site.weight.cols());
        Some(match tangent {
            Tangent::Triplets(t) => Self::Products(WITH_TRIPLETS * t.e.count() * d_out * d_in),
            // The gradient and both projections through one of them, and a square of the other.
            Tangent::Vectors { inner, .. } => {
                let rank = inner.count();
                Self::Products(rank * (d_out * d_in + rank * (2 * d_out + d_in)))
            }
            Tangent::Scales { .. } | Tangent::Kronecker { .. } | Tangent::Monarch { .. } => {
                Self::Passes
            }
        })
    }
}

/// Whether the meter reads a site: linear maps that a method adapts.
pub(super) fn is_read(site: &TrainedSite) -> bool {
    let adapted = site.parameters > 0 && !matches!(site.form, Form::Rows(_) | Form::Bias);
    match site.kind {
        Some(SiteKind::Linear) => adapted,
        // The loss goes around a head that trains itself.
        Some(SiteKind::Head) => adapted && site.form != Form::Whole,
        Some(SiteKind::Embedding | SiteKind::Norm) | None => false,
    }
}

/// The rank of two factors that are all that moves the site's weight: then its gradient is reduced
/// at once to what they need.
fn rank_of_factors(site: &TrainedSite) -> Option<usize> {
    let own = site.parameters - site.replaced.min(site.parameters);
    let pair = site.pair.filter(|pair| own == pair.a() + pair.b())?;
    Some(pair.rank)
}

/// Values of the gradients of weights that the meter keeps until a step is done. With one
/// micro-batch, those of sites with two factors are reduced one by one, and the largest counts.
pub(super) fn values(trained: &[TrainedSite], config: &TrainConfig, several: bool) -> u64 {
    if config.meter_every == 0 {
        return 0;
    }
    let (mut kept, mut largest) = (0, 0);
    for site in trained.iter().filter(|site| is_read(site)) {
        let weight = site.shape.0 * site.shape.1;
        let reduced = rank_of_factors(site).is_some() && !several;
        largest = largest.max(weight);
        kept += if reduced { 0 } else { weight };
    }
    // The one that is being formed.
    (kept + largest) as u64
}

/// The work of readings.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Work {
    /// Steps from one reading to the next; 0 without readings.
    every: usize,
    /// Multiply-adds of a token of a step that is read: the gradients of the weights.
    pub of_token: f64,
    /// Multiply-adds that a reading takes whatever the tokens are.
    pub of_reading: f64,
    /// Values of weights that a reading passes over.
    pub evaluated: f64,
}

impl Work {
    /// The work of a run.
    pub fn new(trained: &[TrainedSite], config: &TrainConfig) -> Self {
        let mut work = Self {
            every: config.meter_every,
            ..Self::default()
        };
        for site in trained.iter().filter(|site| is_read(site)) {
            let weight = (site.shape.0 * site.shape.1) as f64;
            work.of_token += weight;
            match (site.form, rank_of_factors(site), site.known) {
                (Form::Whole, _, _) => {}
                // The products with what either factor spans.
                (_, Some(rank), _) => work.of_reading += 2.0 * rank as f64 * weight,
                (_, None, Some(Known::Products(products))) => work.of_reading += products as f64,
                (_, None, Some(Known::Passes)) => work.evaluated += WITH_FACTORS * weight,
                (_, None, None) if site.pair.is_some() => work.evaluated += WITH_FACTORS * weight,
                (_, None, None) => work.evaluated += LEAST_SQUARES * weight,
            }
        }
        work
    }

    /// Readings in the mean over the steps of a run.
    pub fn readings_a_step(&self, survey: &Survey) -> f64 {
        let all = survey.total_steps.checked_div(self.every).unwrap_or(0);
        all as f64 / survey.total_steps.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;

    fn every(meter_every: usize) -> TrainConfig {
        TrainConfig {
            meter_every,
            ..TrainConfig::default()
        }
    }

    /// Values of q and o, k and v, three of the feed-forward, in two layers.
    const ALL: u64 = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48);

    #[test]
    fn gradients_are_kept_that_cannot_be_reduced() {
        let mut model = fixture::model("llama/tied_gqa");
        let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
        let metered = every(10);
        assert_eq!(values(&trained, &metered, false), 32 * 48);
        assert_eq!(values(&trained, &metered, true), ALL + 32 * 48);
        assert_eq!(values(&trained, &TrainConfig::default(), true), 0);
        let whole = TrainedSite::whole_model(&*model);
        assert_eq!(values(&whole, &metered, false), ALL + 32 * 48);
        let (head, _) = fixture::attached(&mut *model, &fixture::lora(&["lm_head"]));
        assert_eq!(values(&head, &metered, false), 96 * 32);
        // Lengths of rows move the weight as well, vectors around projections or triplets do alone.
        for method in ["dora", "vera", "adalora"] {
            let config = tangent_peft::AdapterConfig {
                method: method.into(),
                ..fixture::lora(&["all-linear"])
            };
            let (trained, _) = fixture::attached(&mut *model, &config);
            assert_eq!(values(&trained, &metered, false), ALL + 32 * 48, "{method}");
        }
    }

    #[test]
    fn a_reading_takes_a_product_a_site_and_what_its_form_needs() {
        let mut model = fixture::model("llama/tied_gqa");
        let all = ALL as f64;
        let (trained, _) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
        let work = Work::new(&trained, &every(10));
        let want = Work {
            every: 10,
            of_token: all,
            of_reading: 2.0 * 4.0 * all,
            evaluated: 0.0,
        };
        assert_eq!(work, want);
        let survey = Survey {
            total_steps: 25,
            ..Survey::default()
        };
        assert_eq!(work.readings_a_step(&survey), 2.0 / 25.0);
        assert_eq!(Work::default().readings_a_step(&survey), 0.0);
        let whole = TrainedSite::whole_model(&*model);
        let work = Work::new(&whole, &every(1));
        assert_eq!((work.of_token, work.of_reading), (all, 0.0));
        for (method, products, passes) in [
            ("dora", 0.0, WITH_FACTORS),
            ("loha", 0.0, LEAST_SQUARES),
            ("lokr", 0.0, WITH_FACTORS),
            ("monarch", 0.0, WITH_FACTORS),
            ("ia3", 0.0, WITH_FACTORS),
            ("adalora", WITH_TRIPLETS as f64 * 4.0, 0.0),
        ] {
            let config = tangent_peft::AdapterConfig {
                method: method.into(),
                ..fixture::lora(&["all-linear"])
            };
            let (trained, _) = fixture::attached(&mut *model, &config);
            let work = Work::new(&trained, &every(1));
            let got = (work.of_reading, work.evaluated);
            assert_eq!(got, (products * all, passes * all), "{method}");
        }
    }
}
