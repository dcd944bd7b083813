//! LoRA with a normal A: `A ~ N(0, 1/rank^2)`, `B = 0`.
//!
//! ```text
//! A_ij = z_ij / rank,  z_ij ~ N(0, 1)        B = 0
//!
//! A: (rank, d_in)      B: (d_out, rank)
//! ```
//!
//! `B A = 0`, so the model is unchanged. Cost: `rank d_in` random numbers a site. The LoRA paper
//! (2106.09685) says "a random Gaussian initialization for A" and no width; the width is PEFT's
//! (`init_lora_weights="gaussian"`).

use super::{Factors, Init, Needs, Setup, anything, normal};
use crate::error::PeftError;

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "gaussian",
    summary: "A normal of width 1/rank, B zero",
    paper: "2106.09685",
    moves_base: false,
    needs: Needs::Nothing,
    redistributes: false,
    settings: &[],
    check: anything,
    factors,
};

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    let (d_out, d_in) = setup.sides();
    let width = (setup.rank as f64).recip();
    let count = setup.rank * d_in;
    let rng = &mut setup.rng;
    Ok(Factors {
        a: (0..count).map(|_| (normal(rng) * width) as f32).collect(),
        b: vec![0.0; d_out * setup.rank],
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{config, factors_of, site};

    #[test]
    fn a_has_the_width_of_peft_and_b_is_zero() {
        let site = site(9, 3000, 1);
        let found = factors_of(&config("gaussian", 4, &[]), &site, &[]);
        assert!(found.b.iter().all(|v| *v == 0.0));
        let count = found.a.len() as f32;
        assert_eq!(count, 12_000.0);
        let mean = found.a.iter().sum::<f32>() / count;
        let width = (found.a.iter().map(|v| v * v).sum::<f32>() / count).sqrt();
        assert!(
            mean.abs() < 0.01 && (width - 0.25).abs() < 0.01,
            "{mean} {width}"
        );
    }
}
