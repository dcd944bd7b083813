//! The largest adapter of a recipe that trains no more parameters than a budget allows.

use std::collections::BTreeMap;

use tangent_model::family::Model;
use tangent_peft::{AdapterConfig, PeftError, SettingValue, attach, detach, init, methods};

use super::recipe::{Recipe, Shared};
use crate::plan::TrainedSite;

/// The largest rank, or number of units, tokens or block's values, that is tried.
const LARGEST: usize = 4096;

/// The size for a budget of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The largest one within it.
    Size(usize),
    /// The smallest one trains so many parameters.
    Least(usize),
}

/// The largest size of a recipe with at most `limit` parameters, and at most `room` virtual tokens.
///
/// # Errors
/// If the recipe does not fit the model, whatever its size.
pub fn largest(
    model: &mut dyn Model,
    recipe: &Recipe,
    shared: &Shared,
    limit: usize,
    room: usize,
) -> Result<Fit, PeftError> {
    let least = recipe.least_size();
    let variant = recipe.variant(shared, Some(least))?;
    let smallest = parameters(model, &variant.adapter)?;
    if smallest > limit {
        return Ok(Fit::Least(smallest));
    }
    if variant.size == 0 {
        return Ok(Fit::Size(0));
    }
    if recipe.counts_parameters() {
        return all_of(model, recipe, shared, limit).map(Fit::Size);
    }
    init::check(&variant.adapter, &model.sites())?;
    let mut count = |size: usize| -> Result<Option<usize>, PeftError> {
        let variant = recipe.variant(shared, Some(recipe.possible_size(size)))?;
        if variant.adapter.virtual_tokens() > room {
            return Ok(None);
        }
        // The least size passes, so this one is too large for its start values.
        if init::check(&variant.adapter, &model.sites()).is_err() {
            return Ok(None);
        }
        match parameters(model, &variant.adapter) {
            // No matrix has such a rank, no row so many tokens, no model so many values.
            Err(
                PeftError::Rank { .. }
                | PeftError::Blocks { .. }
                | PeftError::VirtualTokens { .. }
                | PeftError::Dimension { .. },
            ) => Ok(None),
            counted => counted.map(Some),
        }
    };
    fitting((least, smallest), limit, &mut count).map(Fit::Size)
}

/// The largest size of a recipe whose size is its number of parameters.
fn all_of(
    model: &mut dyn Model,
    recipe: &Recipe,
    shared: &Shared,
    limit: usize,
) -> Result<usize, PeftError> {
    let variant = recipe.variant(shared, Some(limit))?;
    match parameters(model, &variant.adapter) {
        // The model has fewer values.
        Err(PeftError::Dimension { limit: most, .. }) if most < limit => Ok(most),
        counted => counted.map(|_| limit),
    }
}

/// The least size with the largest count within `limit`, from the least size and its count on,
/// which is within it. `count` does not fall; `None` stands for sizes that are too large.
fn fitting<E>(
    least: (usize, usize),
    limit: usize,
    count: &mut impl FnMut(usize) -> Result<Option<usize>, E>,
) -> Result<usize, E> {
    let fits = |counted: &usize| *counted <= limit;
    let (mut inside, mut most) = least;
    let mut outside = LARGEST + 1;
    while 2 * inside <= LARGEST {
        match count(2 * inside)?.filter(fits) {
            None => {
                outside = 2 * inside;
                break;
            }
            // It has stopped to grow.
            Some(same) if same == most => {
                outside = inside + 1;
                break;
            }
            Some(more) => (inside, most) = (2 * inside, more),
        }
    }
    while outside - inside > 1 {
        let middle = inside + (outside - inside) / 2;
        match count(middle)?.filter(fits) {
            Some(more) => (inside, most) = (middle, more),
            None => outside = middle,
        }
    }
    // Smaller sizes may train as many.
    let mut fewer = least.0.saturating_sub(1);
    let mut middle = inside.saturating_sub(1);
    while inside - fewer > 1 {
        match count(middle)? {
            Some(same) if same == most => inside = middle,
            _ => fewer = middle,
        }
        middle = fewer + (inside - fewer) / 2;
    }
    Ok(inside)
}

/// Trained values of an adapter; what was attached before is detached.
///
/// # Errors
/// If it does not fit the model.
pub fn parameters(model: &mut dyn Model, config: &AdapterConfig) -> Result<usize, PeftError> {
    if methods::find(&config.method)?.whole_model {
        let sites = TrainedSite::whole_model(model);
        return Ok(sites.iter().map(|site| site.parameters).sum());
    }
    // Shapes do not depend on start values, which may take long to find.
    let config = AdapterConfig {
        init: init::KAIMING.id.into(),
        own: own(config)?,
        ..config.clone()
    };
    let counted = attach(model, &config, 0).map(|adapter| adapter.count());
    detach(model);
    counted
}

/// The settings of a configuration that are its method's and not its initialization's.
fn own(config: &AdapterConfig) -> Result<BTreeMap<String, SettingValue>, PeftError> {
    let mut own = config.own.clone();
    let method = methods::find(&config.method)?;
    own.retain(|name, _| method.settings.iter().any(|s| s.name == name));
    Ok(own)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::compare::recipe;

    fn model() -> Box<dyn Model> {
        tangent_testkit::model(&tangent_testkit::folder("llama/tied_gqa"))
    }

    #[test]
    fn the_largest_size_within_a_limit_is_found() {
        let fit = |limit: usize, most: usize, ceiling: usize| {
            let mut tried = 0;
            let mut count = |size: usize| -> Result<Option<usize>, Infallible> {
                tried += 1;
                Ok((size <= most).then_some((10 * size).min(ceiling)))
            };
            let Ok(found) = fitting((1, 10), limit, &mut count);
            assert!(tried <= 26, "{tried}");
            found
        };
        for size in [1, 2, 3, 7, 8, 100, 4096] {
            assert_eq!(fit(10 * size, usize::MAX, usize::MAX), size);
            assert_eq!(fit(10 * size + 9, usize::MAX, usize::MAX), size);
            assert_eq!(fit(usize::MAX, size, usize::MAX), size);
        }
        // Sizes that add nothing are not taken.
        assert_eq!(fit(10_000, usize::MAX, 320), 32);
        assert_eq!(fit(10_000, usize::MAX, 330), 33);
    }

    #[test]
    fn recipes_keep_to_a_budget_of_parameters() {
        let mut model = model();
        let shared = Shared::default();
        let mut fit = |name: &str, limit| {
            let recipe = recipe::find(&[name.to_owned()]).unwrap()[0];
            let found = largest(&mut *model, recipe, &shared, limit, 40).unwrap();
            assert!(model.sites().iter().all(|site| !site.is_trained()));
            assert!(model.whole().prefix.is_none());
            found
        };
        // q and o (32, 32), k and v (16, 32), gate and up (48, 32), down (32, 48), in two layers.
        let each = 2 * (2 * 64 + 2 * 48 + 3 * 80);
        assert_eq!(fit("lora", 5 * each), Fit::Size(5));
        assert_eq!(fit("lora", 6 * each - 1), Fit::Size(5));
        assert_eq!(fit("pissa", 5 * each), Fit::Size(5));
        // Ranks that are even, and one that falls to two thirds.
        assert_eq!(fit("orthogonal", 5 * each), Fit::Size(4));
        assert_eq!(fit("orthogonal", 2 * each), Fit::Size(2));
        assert_eq!(fit("orthogonal", 2 * each - 1), Fit::Least(2 * each));
        assert_eq!(fit("adalora", 7 * (each + 14)), Fit::Size(4));
        assert_eq!(fit("lora", each - 1), Fit::Least(each));
        // No matrix has a larger rank than its smaller side.
        assert_eq!(fit("lora", usize::MAX), Fit::Size(16));
        let Fit::Least(all) = fit("full", each) else {
            panic!("all parameters are more than a few");
        };
        assert_eq!(fit("full", all), Fit::Size(0));
        // 32 features of each virtual token, and no more tokens than there is room for.
        assert_eq!(fit("prompt-tuning", 7 * 32 + 31), Fit::Size(7));
        assert_eq!(fit("prompt-tuning", usize::MAX), Fit::Size(40));
        // A dimension is a number of parameters, up to all values of the adapted weights.
        assert_eq!(fit("intrinsic", 5000), Fit::Size(5000));
        let values = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48);
        assert_eq!(fit("intrinsic", values + 1), Fit::Size(values));
        assert_eq!(fit("intrinsic", 1), Fit::Least(2));
    }
}
