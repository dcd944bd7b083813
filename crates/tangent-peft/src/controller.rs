//! What a method does between steps beyond the optimizer's work: penalties and budgets.

use std::ops::Range;

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

/// What the methods of an adapter do between the steps of a run of so many; `None` if nothing.
///
/// # Errors
/// If a setting does not fit the run.
pub fn of(adapter: &Adapter, steps: usize) -> Result<Option<Box<dyn Controller>>, PeftError> {
    let of_one = |part: &Adapter| {
        part.method
            .control
            .map(|begin| begin(part, steps))
            .transpose()
    };
    if adapter.parts.is_empty() {
        return of_one(adapter);
    }
    let (mut parts, mut before) = (vec![], 0);
    for (index, part) in adapter.parts.iter().enumerate() {
        let parameters = before..before + part.parameters.len();
        before = parameters.end;
        if let Some(controller) = of_one(part)? {
            parts.push(Part {
                index,
                parameters,
                controller,
            });
        }
    }
    if parts.is_empty() {
        return Ok(None);
    }
    Ok(Some(Box::new(Parts(parts))))
}

/// A controller of one of the adapters that one is put together from.
struct Part {
    /// Which of them.
    index: usize,
    /// Where its parameters are among those of all.
    parameters: Range<usize>,
    controller: Box<dyn Controller>,
}

/// Controllers side by side, each of which sees its own adapter and gradients alone.
struct Parts(Vec<Part>);

impl Controller for Parts {
    fn before_step(&mut self, adapter: &Adapter, gradients: &mut Gradients) {
        for part in &mut self.0 {
            let own = gradients.get_mut(part.parameters.clone());
            if let (Some(adapter), Some(own)) = (adapter.parts.get(part.index), own) {
                part.controller.before_step(adapter, own);
            }
        }
    }

    fn after_step(&mut self, adapter: &Adapter, gradients: &Gradients, step: usize) {
        for part in &mut self.0 {
            let own = gradients.get(part.parameters.clone());
            if let (Some(adapter), Some(own)) = (adapter.parts.get(part.index), own) {
                part.controller.after_step(adapter, own, step);
            }
        }
    }

    fn state(&self) -> Vec<(String, Vec<f32>)> {
        // Named by sites, each of which one method adapts.
        self.0
            .iter()
            .flat_map(|part| part.controller.state())
            .collect()
    }

    fn restore(&mut self, values: &Stored<'_>) -> Result<(), PeftError> {
        for part in &mut self.0 {
            part.controller.restore(values)?;
        }
        Ok(())
    }
}
