//! Start values of low-rank factors. An initialization is one file and one line in [`INITS`].

use rand::{Rng, RngExt};
use rand_chacha::ChaCha8Rng;
pub(crate) use tangent_linalg::normal;
use tangent_linalg::{LinalgError, MatRef};
use tangent_model::{Site, SiteKind};

use crate::adapter::chosen;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::methods::checked_rank;
use crate::name;
use crate::setting::{Setting, SettingValue};

pub mod corda;
pub mod eva;
pub mod gaussian;
pub mod kaiming;
pub mod loftq;
pub mod lora_ga;
pub mod milora;
pub mod olora;
pub mod orthogonal;
pub mod pissa;
pub mod qpissa;
pub mod ranks;
mod residual;
mod spectrum;

#[cfg(test)]
mod fixture;

pub use kaiming::INIT as KAIMING;
pub(crate) use residual::{base, residual_of};

/// An initialization as the rest of the program sees it.
pub struct Init {
    /// Name in flags.
    pub id: &'static str,
    /// What the factors are at the start, in a few words for tables.
    pub summary: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// Whether the product of the factors is taken out of the base by a second product beside it, so
    /// that the model is unchanged.
    pub moves_base: bool,
    /// What it looks at besides the weight.
    pub needs: Needs,
    /// Whether ranks move from site to site by what the sites' inputs hold (setting `rho`).
    pub redistributes: bool,
    /// Settings of its own.
    pub settings: &'static [Setting],
    /// Checks its settings and the rank of one linear site, before anything is computed.
    pub check: Check,
    /// Computes the factors of one linear site.
    pub factors: fn(&mut Setup<'_>) -> Result<Factors, PeftError>,
}

/// Checks settings, and the rank of one linear site.
pub type Check = fn(&AdapterConfig, &Site, usize) -> Result<(), PeftError>;

impl Init {
    /// Whether its factors are computed once, before a run, and kept for when it is resumed: they
    /// need the training data, or what is taken out of the base is part of what the adapter
    /// computes.
    pub fn is_kept(&self) -> bool {
        self.moves_base || self.needs != Needs::Nothing
    }
}

/// What an initialization looks at besides the weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// The weight before it was quantized, `(d_out, d_in)`.
    Original,
    /// The gradient of the mean loss with respect to the weight, `(d_out, d_in)`.
    Gradient,
    /// Second moments of the site's inputs, `(d_in, d_in)`.
    Inputs(Moments),
}

impl Needs {
    /// What is needed, in words; empty for nothing.
    pub fn words(self) -> &'static str {
        match self {
            Self::Nothing => "",
            Self::Original => "original weights",
            Self::Gradient => "gradients",
            Self::Inputs(_) => "inputs",
        }
    }

    /// Whether it takes a pass over training data.
    pub fn is_of_data(self) -> bool {
        matches!(self, Self::Gradient | Self::Inputs(_))
    }
}

/// How second moments of inputs x are gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moments {
    /// The sum of `(x - mean) (x - mean)^T` over the supervised tokens.
    AboutMean,
    /// The mean over rows of `X^T X / max(X)^2`, X `(tokens, d_in)` being all inputs of a row.
    OfRows,
}

/// One site whose factors are to be computed.
pub struct Setup<'a> {
    /// The settings.
    pub config: &'a AdapterConfig,
    /// The site.
    pub site: &'a Site,
    /// Rank of the factors.
    pub rank: usize,
    /// Scaling of their product.
    pub scaling: f32,
    /// Random numbers that depend on the seed and the site only.
    pub rng: ChaCha8Rng,
    /// What [`Init::needs`] names, row-major; empty for nothing.
    pub evidence: &'a [f32],
    /// Set where the base is quantized anew (see [`requantizes`]): factors whose product leaves the
    /// weight before that.
    pub taken: Option<Factors>,
}

impl<'a> Setup<'a> {
    /// `(d_out, d_in)` of the weight.
    fn sides(&self) -> (usize, usize) {
        (self.site.weight.rows(), self.site.weight.cols())
    }

    /// The evidence as a matrix of `rows` rows.
    fn evidence(&self, rows: usize) -> MatRef<'a, f32> {
        MatRef::from_row_major_slice(self.evidence, rows, self.evidence.len() / rows.max(1))
    }

    /// A fault of a decomposition, with the site's name.
    fn fault(&self, source: LinalgError) -> PeftError {
        PeftError::Linalg {
            site: self.site.path.clone(),
            source,
        }
    }
}

/// Start values: `a: (rank, d_in)`, `b: (d_out, rank)`, row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Factors {
    /// Rows in the input space.
    pub a: Vec<f32>,
    /// Columns in the output space.
    pub b: Vec<f32>,
}

/// What one linear site starts with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Started {
    /// Start values.
    pub factors: Factors,
    /// Factors whose product, times the scaling of the site, leaves the weight before it is quantized
    /// anew; none where the base stays.
    pub taken: Option<Factors>,
}

/// `count` numbers uniform in +-1/sqrt(inputs), as PyTorch's maps begin.
pub(crate) fn uniform(rng: &mut impl Rng, count: usize, inputs: usize) -> Vec<f32> {
    let bound = (inputs as f32).sqrt().recip();
    let number = || (rng.random::<f32>() * 2.0 - 1.0) * bound;
    std::iter::repeat_with(number).take(count).collect()
}

/// Every initialization.
pub const INITS: &[Init] = &[
    kaiming::INIT,
    gaussian::INIT,
    orthogonal::INIT,
    pissa::INIT,
    milora::INIT,
    olora::INIT,
    lora_ga::INIT,
    eva::INIT,
    corda::INIT,
    loftq::INIT,
    qpissa::INIT,
];

/// The setting of initializations that look at training data; all of them have one of its name.
const ROWS: Setting = Setting {
    name: "rows",
    default: SettingValue::Number(32.0),
    summary: "rows of training data to look at, the first ones in the order of training",
};

/// The initialization called `id`.
///
/// # Errors
/// If there is none.
pub fn find(id: &str) -> Result<&'static Init, PeftError> {
    name::find(INITS, id, |init| init.id).map_err(PeftError::UnknownInit)
}

/// Checks the initialization of `config` at every site that is adapted, before anything is
/// computed; `sites` are the model's. The default one fits wherever its method does.
///
/// # Errors
/// If a setting is out of its range, or a site is no linear map or too small.
pub fn check(config: &AdapterConfig, sites: &[&Site]) -> Result<(), PeftError> {
    let init = find(&config.init)?;
    if init.id == KAIMING.id {
        return Ok(());
    }
    if init.needs.is_of_data() {
        rows(config)?;
    }
    for site in chosen(config, sites)? {
        if !matches!(site.kind, SiteKind::Linear | SiteKind::Head) {
            return Err(PeftError::Site {
                method: init.id,
                site: site.path.clone(),
                why: "this initialization is one of linear maps; leave the site out or choose the \
                      default one",
            });
        }
        (init.check)(config, site, checked_rank(config, site)?)?;
    }
    Ok(())
}

/// Whether the base is quantized anew, without a product of factors that leaves the weight before.
///
/// # Errors
/// If the initialization does not exist or a setting is out of its range.
pub fn requantizes(config: &AdapterConfig) -> Result<bool, PeftError> {
    match find(&config.init)?.id {
        id if id == qpissa::INIT.id => Ok(true),
        id if id == loftq::INIT.id => Ok(residual::iterations(config)? > 1),
        _ => Ok(false),
    }
}

/// The number of rows that an initialization looks at.
///
/// # Errors
/// If it is not a whole number of at least 1.
///
/// # Panics
/// If the initialization looks at none.
pub fn rows(config: &AdapterConfig) -> Result<usize, PeftError> {
    config.whole("rows", 1, "must be a whole number of at least 1")
}

/// Steps to whose rows a pass for gradients keeps where `rows` is not given. Its micro-batches take up
/// to twice as long as those of training, and a start shall not take longer than ten steps: neither
/// the rows of four steps do, nor five rows of a step each.
const STEPS_OF_GRADIENTS: usize = 4;

/// Steps of training to whose rows an initialization keeps, of the [`rows`] that it looks at, unless
/// they are very few; `None` if it takes what the setting says.
///
/// # Errors
/// If the initialization does not exist.
pub fn steps(config: &AdapterConfig) -> Result<Option<usize>, PeftError> {
    let is_typed = config.own.contains_key(ROWS.name);
    let is_long = find(&config.init)?.needs == Needs::Gradient;
    Ok((is_long && !is_typed).then_some(STEPS_OF_GRADIENTS))
}

/// The values of a site's weight before it was quantized, for [`Needs::Original`].
///
/// # Errors
/// If it was not quantized when the model was opened, or cannot be read again.
pub fn original(init: &Init, site: &Site) -> Result<Vec<f32>, PeftError> {
    let original = site.original.as_ref();
    let original = original.ok_or_else(|| not_quantized(init.id, site))?;
    let original = original()?;
    let values = original.to_values();
    original.leave();
    Ok(values)
}

fn not_quantized(method: &'static str, site: &Site) -> PeftError {
    PeftError::Site {
        method,
        site: site.path.clone(),
        why: "the weight was not quantized when the model was opened; give the original model with \
              --base-dtype nf4, fp4 or int8, which quantizes the linear maps of layers",
    }
}

/// [`Init::check`] where every setting and rank fits.
fn anything(_: &AdapterConfig, _: &Site, _: usize) -> Result<(), PeftError> {
    Ok(())
}

/// A setting that is one of some words; `why` lists them.
fn one_of(
    config: &AdapterConfig,
    setting: &'static str,
    words: &[&str],
    why: &'static str,
) -> Result<(), PeftError> {
    let value = config.own(setting);
    if words.contains(&value.word()) {
        return Ok(());
    }
    Err(PeftError::Setting {
        setting,
        value: value.to_string(),
        why,
    })
}

#[cfg(test)]
mod tests {
    use super::fixture::{config, quantized, site};
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for (index, init) in INITS.iter().enumerate() {
            assert!(INITS[..index].iter().all(|other| other.id != init.id));
            assert_eq!(find(init.id).unwrap().id, init.id);
            let reads_rows = init.settings.iter().any(|s| s.name == ROWS.name);
            assert_eq!(reads_rows, init.needs.is_of_data(), "{}", init.id);
            let has_rho = init.settings.iter().any(|s| s.name == "rho");
            assert_eq!(has_rho, init.redistributes, "{}", init.id);
        }
        let text = find("svd").err().unwrap().to_string();
        assert!(text.contains("pissa, milora"), "{text}");
        assert_eq!(find("lora_ga").unwrap().id, "lora-ga");
        let text = find("pisa").err().unwrap().to_string();
        assert!(text.contains("(did you mean \"pissa\"?)"), "{text}");
    }

    #[test]
    fn faults_are_found_before_anything_is_computed() {
        let site = site(6, 10, 1);
        let number = SettingValue::Number;
        let word = |text: &str| SettingValue::Text(text.to_owned().into());
        for (init, rank, own, words) in [
            ("pissa", 7, vec![], ["rank 7", "6 x 10"]),
            ("pissa", 2, vec![("niter", number(-1.0))], ["niter", "-1"]),
            ("milora", 0, vec![], ["rank 0", "6"]),
            ("orthogonal", 3, vec![], ["rank = 3", "even"]),
            ("lora-ga", 4, vec![], ["rank 4", "8 singular vectors"]),
            (
                "lora-ga",
                2,
                vec![("direction", word("up"))],
                ["direction", "ArB2r"],
            ),
            (
                "lora-ga",
                2,
                vec![("scale", word("big"))],
                ["scale", "stable"],
            ),
            (
                "lora-ga",
                2,
                vec![("gamma", number(0.0))],
                ["gamma", "above 0"],
            ),
            ("lora-ga", 2, vec![("rows", number(0.5))], ["rows", "whole"]),
            ("eva", 2, vec![("rho", number(0.5))], ["rho", "at least 1"]),
            ("corda", 2, vec![("mode", word("pm"))], ["mode", "ipm"]),
            (
                "loftq",
                2,
                vec![("iterations", number(0.0))],
                ["iterations", "at least 1"],
            ),
            (
                "qpissa",
                2,
                vec![("iterations", number(1.5))],
                ["iterations", "whole"],
            ),
            ("qpissa", 2, vec![], ["qpissa", "--base-dtype"]),
        ] {
            let text = check(&config(init, rank, &own), &[&site])
                .unwrap_err()
                .to_string();
            for part in words {
                assert!(text.contains(part), "{init} {part}: {text}");
            }
        }
        for init in INITS {
            let site = quantized(6, 10, 1);
            check(&config(init.id, 2, &[]), &[&site]).unwrap();
            // The rank of the default one is its method's to check.
            if init.id != KAIMING.id {
                let refused = check(&config(init.id, 8, &[]), &[&site]).unwrap_err();
                let text = refused.to_string();
                for part in ["layers.0.proj: rank 8", "6 x 10", "--exclude-modules"] {
                    assert!(text.contains(part), "{} {part}: {text}", init.id);
                }
            }
        }
    }

    #[test]
    fn embeddings_keep_the_default() {
        let mut table = site(6, 10, 1);
        table.kind = SiteKind::Embedding;
        check(&config("kaiming", 2, &[]), &[&table]).unwrap();
        let text = check(&config("pissa", 2, &[]), &[&table])
            .unwrap_err()
            .to_string();
        assert!(text.contains("linear maps"), "{text}");
    }
}
