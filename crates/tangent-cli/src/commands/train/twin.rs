//! The twin of a run: what is printed while it trains.

use std::time::{Duration, Instant};

use tangent_model::family::Model;
use tangent_train::TrainError;
use tangent_train::twin::{self, Readiness, TwinOf, TwinStep};

use crate::progress::{duration, say};

/// Trains the twin of a run if one is asked for and not there, and tells how it goes.
pub fn prepare(model: &mut dyn Model, of: &TwinOf<'_>) -> Result<Readiness, TrainError> {
    let clock = Instant::now();
    let mut spent = Duration::ZERO;
    let every = of.config.logging_steps;
    let readiness = twin::prepare(model, of, &mut |taken| {
        let TwinStep { step, total, loss } = taken;
        if step == 1 || step == total || step.is_multiple_of(every) {
            say(format_args!(
                "full fine-tuning, step {step}/{total}  loss {loss:.4}"
            ));
        }
        spent = clock.elapsed();
    })?;
    match readiness {
        Readiness::Trained => say(format_args!(
            "the twin took {}; now the run itself",
            duration(spent)
        )),
        Readiness::Found => say("the twin was trained before"),
        Readiness::Stopped => {
            say("stopped while the twin trained; nothing of it is kept, and the run has not begun");
        }
        Readiness::NotAsked => {}
    }
    Ok(readiness)
}
