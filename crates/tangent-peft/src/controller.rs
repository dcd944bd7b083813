//! What a method does between steps beyond the optimizer's work: penalties and budgets.

use crate::adapter::Adapter;
use crate::error::PeftError;

/// Gradients of an adapter's parameters in their order; `None` for those that took no part.
pub type Gradients = [Option<Vec<f32>>];

/// Gives a stored vector by its name and length.
pub type Stored<'a> = dyn Fn(&str, usize) -> Result<Vec<f32>, PeftError> + 'a;

/// A method's work between steps. Its state is part of a checkpoint.
pub trait Controller: Send {
    /// Adds to the gradients before they are clipped.
    fn before_step(&mut self, adapter: &Adapter, gradients: &mut Gradients);

    /// Looks at the gradients and changes parameters after the optimizer moved them. `step` counts
    /// from 1.
    fn after_step(&mut self, adapter: &Adapter, gradients: &Gradients, step: usize);

    /// Everything that a resumed run needs, by name.
    fn state(&self) -> Vec<(String, Vec<f32>)>;

    /// Takes the state back; `values` gives a vector of the length that [`state`](Self::state)
    /// has now by its name.
    ///
    /// # Errors
    /// If `values` fails.
    fn restore(&mut self, values: &Stored<'_>) -> Result<(), PeftError>;
}
