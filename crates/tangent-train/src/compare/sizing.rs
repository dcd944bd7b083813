//! The settings of recipes on a model: a size within the budget, or why there is none.

use burn::tensor::Device;
use tangent_model::family::Model;
use tangent_peft::{AdapterConfig, PeftError, init};

use super::Budget;
use super::ranks::{self, Fit};
use super::recipe::{Recipe, Shared, Variant};
use crate::error::TrainError;
use crate::evidence;

/// What sizes are decided by.
pub struct Sizing<'a> {
    /// Settings that all recipes begin with.
    pub shared: &'a Shared,
    /// What every run may take.
    pub budget: Budget,
    /// Virtual tokens that leave room for the longest row.
    pub room: usize,
}

impl Sizing<'_> {
    /// The settings of a recipe of a size. Where parameters are counted, ranks stay that start
    /// values would move from site to site.
    pub fn variant(&self, recipe: &Recipe, size: Option<usize>) -> Result<Variant, PeftError> {
        let mut variant = recipe.variant(self.shared, size)?;
        if matches!(self.budget, Budget::Parameters(_)) {
            Recipe::keep_ranks(&mut variant.adapter)?;
        }
        Ok(variant)
    }

    /// The settings of a recipe of a size within the budget and how much they train, or why there
    /// is none: it needs more, or this model cannot have it.
    pub fn sized(
        &self,
        model: &mut dyn Model,
        recipe: &Recipe,
    ) -> Result<Result<(Variant, usize), String>, PeftError> {
        self.variant(recipe, None)?.adapter.validate()?;
        match self.fitted(model, recipe) {
            Err(error) if !is_of_shared(&error) => Ok(Err(error.to_string())),
            found => found,
        }
    }

    /// [`sized`](Self::sized), without telling errors of the recipe from others.
    fn fitted(
        &self,
        model: &mut dyn Model,
        recipe: &Recipe,
    ) -> Result<Result<(Variant, usize), String>, PeftError> {
        let mut size = None;
        if let Budget::Parameters(limit) = self.budget {
            match ranks::largest(model, recipe, self.shared, limit, self.room)? {
                Fit::Size(largest) => size = Some(largest),
                Fit::Least(least) => {
                    return Ok(Err(format!(
                        "beyond the budget: it trains at least {least} parameters"
                    )));
                }
            }
        }
        let variant = self.variant(recipe, size)?;
        variant.adapter.validate()?;
        init::check(&variant.adapter, &model.sites())?;
        let parameters = ranks::parameters(model, &variant.adapter)?;
        Ok(Ok((variant, parameters)))
    }

    /// The settings of a recipe of another size and how much they train, or why the model cannot
    /// have it.
    pub fn resized(
        &self,
        model: &mut dyn Model,
        recipe: &Recipe,
        size: usize,
    ) -> Result<Result<(Variant, usize), String>, PeftError> {
        let variant = self.variant(recipe, Some(size))?;
        if variant.adapter.virtual_tokens() > self.room {
            let room = self.room;
            return Ok(Err(format!(
                "the longest row leaves room for {room} virtual tokens"
            )));
        }
        let checked = init::check(&variant.adapter, &model.sites());
        match checked.and_then(|()| ranks::parameters(model, &variant.adapter)) {
            Err(error) if !is_of_shared(&error) => Ok(Err(error.to_string())),
            counted => Ok(Ok((variant, counted?))),
        }
    }
}

/// Why the model's device cannot compute an adapter's start values, if it cannot.
pub fn unseen(model: &dyn Model, adapter: &AdapterConfig) -> Result<Option<String>, TrainError> {
    let looks = evidence::rows(adapter)?.most > 0;
    let shows = model.device().without_autodiff() == Device::flex();
    Ok((looks && !shows).then(|| {
        "its start values look at gradients or inputs of layers, which only the CPU's kernels show"
            .to_owned()
    }))
}

/// Whether an error is one of the settings that all recipes begin with, not of one recipe.
fn is_of_shared(error: &PeftError) -> bool {
    matches!(
        error,
        PeftError::UnknownTarget { .. }
            | PeftError::UnknownSublayer { .. }
            | PeftError::UnknownPattern { .. }
            | PeftError::Pattern { .. }
            | PeftError::UnknownMethod(_)
            | PeftError::UnknownInit(_)
            | PeftError::UnknownSetting(_)
            | PeftError::SettingType { .. }
            | PeftError::Unread { .. }
    )
}
