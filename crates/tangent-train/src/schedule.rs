//! Learning-rate schedules: warm-up, then constant, linear or cosine decay to zero.

use std::fmt;
use std::str::FromStr;

/// The shape after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// The peak rate throughout.
    Constant,
    /// Down to zero on a straight line.
    #[default]
    Linear,
    /// Down to zero on half a cosine.
    Cosine,
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "constant" | "constant_with_warmup" => Ok(Self::Constant),
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            other => Err(format!(
                "\"{other}\" is not one of constant, linear, cosine"
            )),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Constant => "constant",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
        })
    }
}

impl Schedule {
    /// The factor of the peak rate for the step with `done` steps before it, of `total`.
    pub fn factor(self, done: usize, warmup: usize, total: usize) -> f64 {
        if done < warmup {
            return done as f64 / warmup.max(1) as f64;
        }
        let progress = (done - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
        }
    }
}
