//! The authors' start of LoRA: A uniform, B zero.
//!
//! ```text
//! A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))        B = 0
//!
//! A: (rank, d_in)      B: (d_out, rank)
//! ```
//!
//! `B A = 0`, so the model is unchanged. Cost: `rank d_in` random numbers a site. Paper:
//! 2106.09685.
//!
//! The paper draws A from a normal distribution; the authors' code and PEFT draw it uniformly, and
//! so do we.

use super::{Factors, Init, Needs, Setup, anything, uniform};
use crate::error::PeftError;

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "kaiming",
    summary: "A uniform, B zero",
    paper: "2106.09685",
    moves_base: false,
    needs: Needs::Nothing,
    redistributes: false,
    settings: &[],
    check: anything,
    factors,
};

/// The factors, also where another initialization has nothing to go by.
pub(super) fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let (d_out, d_in) = setup.sides();
    Ok(Factors {
        a: uniform(&mut setup.rng, setup.rank * d_in, d_in),
        b: vec![0.0; d_out * setup.rank],
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{config, factors_of, site};

    #[test]
    fn a_fills_its_interval_and_b_is_zero() {
        let site = site(7, 400, 1);
        let found = factors_of(&config("kaiming", 5, &[]), &site, &[]);
        assert_eq!((found.a.len(), found.b.as_slice()), (2000, &[0.0; 35][..]));
        let largest = found.a.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!((0.049..=0.05).contains(&largest), "{largest}");
    }
}
