//! LoRA-GA: factors from the gradient of the weight, so that the first step of A and B is as near
//! as their rank allows to a step of full fine-tuning.
//!
//! ```text
//! G = dL/dW = U S V^T        A = c V_I^T        B = c U_J        the base becomes W - s B A
//!
//! first step of gradient descent: dW ~ -s^2 (B B^T G + G A^T A) = -(s c)^2 U_2r S_2r V_2r^T
//!
//! G: (d_out, d_in)   I, J: disjoint halves of the 2 rank largest singular values (`direction`)
//! A: (rank, d_in)    B: (d_out, rank)   s: scaling
//!
//! direction  ArB2r  I first half, J second        scale  stable   c = d_out^(1/4) / sqrt(gamma)
//!            A2rBr  I second half, J first               unit     c = 1
//!            ArBr   I odd places, J even ones            gd       c = 1 / s
//!            random I any half, J the other              weightS  c = mean_i sqrt(sigma_i(W) / s)
//! ```
//!
//! The model is unchanged: `s B A` is taken out of the base, by a second product, whatever the base
//! is stored as. A site without a gradient starts as plain LoRA. The smaller side of a weight must
//! be at least twice the rank. Cost: a pass over `rows` rows of training data that holds one
//! layer's gradients at a time, and `10 q d_out d_in` multiply-adds a site, `q = min(4 rank, d_out,
//! d_in)`: as the authors we take 4 power iterations. Where `rows` is not given, the pass ends with
//! the rows of the fourth step, which take it about as long as seven steps of training, or with the
//! step that takes the fifth row. Paper: 2407.05000.
//!
//! With `norm_clip`, A and B are multiplied by `sqrt(max |W| / max |s B A|)` where that is below 1, so
//! that no entry of what leaves the base is larger than the largest of the base.
//!
//! Differences from the authors' code: G is the gradient of the mean loss over the supervised
//! tokens of all rows, where theirs is the mean of the micro-batches' means, and it is summed in
//! `f32`. Settings are those of their configuration (gamma 16); the command of their paper has gamma
//! 64 and rank-stabilized scaling. They look at 8 to 128 rows.
//!
//! PEFT's `init_lora_weights="lora_ga"` is another method: there singular values multiply B, only B
//! is scaled by `d_out^(1/4) / sqrt(gamma)`, and `random` takes the same vectors for A and B.

use rand::seq::SliceRandom;
use tangent_linalg::{Mat, MatRef, Svd, product, svd_lowrank, to_rows};
use tangent_model::Site;

use super::{Factors, Init, Needs, Setup, kaiming, one_of, spectrum};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::setting::{Setting, SettingValue};

/// The initialization's entry.
pub const INIT: Init = Init {
    id: "lora-ga",
    summary: "singular vectors of the gradient",
    paper: "2407.05000",
    moves_base: true,
    needs: Needs::Gradient,
    redistributes: false,
    settings: &[
        Setting {
            name: "rows",
            default: SettingValue::Number(32.0),
            summary: "rows of training data to look at, the first ones in the order of training; \
                      if not given no more than the first four steps take, 5 at least",
        },
        Setting {
            name: "direction",
            default: SettingValue::text(DIRECTIONS[0]),
            summary: "singular vectors of A and of B: ArB2r, A2rBr, ArBr, random",
        },
        Setting {
            name: "scale",
            default: SettingValue::text(SCALES[0]),
            summary: "length of the vectors: stable, unit, gd, weightS",
        },
        Setting {
            name: "gamma",
            default: SettingValue::Number(16.0),
            summary: "with scale=stable the length is d_out^(1/4) / sqrt(gamma)",
        },
        Setting {
            name: "norm_clip",
            default: SettingValue::Flag(false),
            summary: "shorten A and B where an entry of their product would exceed the weight's \
                      largest",
        },
    ],
    check,
    factors,
};

const DIRECTIONS: [&str; 4] = ["ArB2r", "A2rBr", "ArBr", "random"];
const SCALES: [&str; 4] = ["stable", "unit", "gd", "weightS"];

/// Power iterations of decompositions.
const ITERATIONS: usize = 4;

fn check(config: &AdapterConfig, site: &Site, rank: usize) -> Result<(), PeftError> {
    let directions = "must be one of ArB2r, A2rBr, ArBr, random";
    one_of(config, "direction", &DIRECTIONS, directions)?;
    one_of(
        config,
        "scale",
        &SCALES,
        "must be one of stable, unit, gd, weightS",
    )?;
    let gamma = config.own("gamma").number();
    if gamma <= 0.0 {
        return Err(PeftError::Setting {
            setting: "gamma",
            value: gamma.to_string(),
            why: "must be above 0",
        });
    }
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    if rows.min(cols) < 2 * rank {
        return Err(PeftError::TooFewDirections {
            site: site.path.clone(),
            init: INIT.id,
            rank,
            needed: 2 * rank,
            rows,
            cols,
        });
    }
    Ok(())
}

fn factors(setup: &mut Setup<'_>) -> Result<Factors, PeftError> {
    if setup.evidence.iter().all(|g| *g == 0.0) {
        return kaiming::factors(setup);
    }
    let (d_out, _) = setup.sides();
    let gradient = setup.evidence(d_out);
    let found = decomposed(setup, gradient)?;
    let (in_a, in_b) = halves(setup);
    let length = length(setup)?;
    let a = Mat::from_fn(setup.rank, found.v.nrows(), |i, j| {
        length * found.v[(j, in_a[i])]
    });
    let b = Mat::from_fn(d_out, setup.rank, |i, j| length * found.u[(i, in_b[j])]);
    let root = match setup.config.own("norm_clip").is_set() {
        true => clipping(setup, &a, &b),
        false => 1.0,
    };
    let scaled = |m: &Mat<f64>| Mat::from_fn(m.nrows(), m.ncols(), |i, j| root * m[(i, j)]);
    Ok(Factors {
        a: to_rows(scaled(&a).as_ref()),
        b: to_rows(scaled(&b).as_ref()),
    })
}

/// What A and B are multiplied by so that no entry of their product, times the scaling, is larger
/// than the weight's largest.
fn clipping(setup: &Setup<'_>, a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let largest = |m: &Mat<f64>| {
        let entries = (0..m.ncols()).flat_map(|j| (0..m.nrows()).map(move |i| m[(i, j)].abs()));
        entries.fold(0.0, f64::max)
    };
    let taken = f64::from(setup.scaling) * largest(&product(b.as_ref(), a.as_ref()));
    let ratio = largest(&spectrum::weight(setup.site)) / taken;
    if ratio < 1.0 { ratio.sqrt() } else { 1.0 }
}

/// The largest singular triplets of the gradient or of the weight.
fn decomposed(setup: &mut Setup<'_>, m: MatRef<'_, f32>) -> Result<Svd, PeftError> {
    let found = svd_lowrank(m, 4 * setup.rank, ITERATIONS, &mut setup.rng);
    found.map_err(|source| setup.fault(source))
}

/// The places in the spectrum that A and B take.
fn halves(setup: &mut Setup<'_>) -> (Vec<usize>, Vec<usize>) {
    let rank = setup.rank;
    match setup.config.own("direction").word() {
        "A2rBr" => ((rank..2 * rank).collect(), (0..rank).collect()),
        "ArBr" => (
            (0..rank).map(|i| 2 * i + 1).collect(),
            (0..rank).map(|i| 2 * i).collect(),
        ),
        "random" => {
            let mut places: Vec<usize> = (0..2 * rank).collect();
            places.shuffle(&mut setup.rng);
            let in_b = places.split_off(rank);
            (places, in_b)
        }
        _ => ((0..rank).collect(), (rank..2 * rank).collect()),
    }
}

/// The length of the rows of A and of the columns of B.
fn length(setup: &mut Setup<'_>) -> Result<f64, PeftError> {
    let (d_out, d_in) = setup.sides();
    let scaling = f64::from(setup.scaling);
    Ok(match setup.config.own("scale").word() {
        "unit" => 1.0,
        "gd" => scaling.recip(),
        "weightS" => {
            let weight = setup.site.weight.to_values();
            let found = decomposed(setup, MatRef::from_row_major_slice(&weight, d_out, d_in))?;
            let roots = found
                .s
                .iter()
                .take(setup.rank)
                .map(|s| (s / scaling).sqrt());
            roots.sum::<f64>() / setup.rank as f64
        }
        _ => (d_out as f64).powf(0.25) / setup.config.own("gamma").number().sqrt(),
    })
}

#[cfg(test)]
mod tests {
    use tangent_linalg::{mat, product, svd};

    use super::super::fixture::{
        close, config, factors_of, falling, matrices, orthogonal_rows, site,
    };
    use super::*;

    const SIDES: [(usize, usize); 2] = [(20, 32), (32, 20)];
    const RANK: usize = 3;

    fn own(direction: &str, scale: &str) -> [(&'static str, SettingValue); 2] {
        let word = |text: &str| SettingValue::Text(text.to_owned().into());
        [("direction", word(direction)), ("scale", word(scale))]
    }

    #[test]
    fn the_first_step_is_the_best_of_twice_the_rank() {
        for (rows, cols) in SIDES {
            let site = site(rows, cols, 1);
            let evidence = falling(rows, cols, 9);
            let g = mat(&evidence, rows, cols);
            let whole = svd(g.as_ref()).unwrap();
            let scaled = Mat::from_fn(rows, 2 * RANK, |i, j| whole.u[(i, j)] * whole.s[j]);
            let v = Mat::from_fn(cols, 2 * RANK, |i, j| whole.v[(i, j)]);
            let best = product(scaled.as_ref(), v.transpose());
            for direction in DIRECTIONS {
                let config = config("lora-ga", RANK, &own(direction, "unit"));
                let (a, b) = matrices(&factors_of(&config, &site, &evidence), RANK);
                orthogonal_rows(direction, &a, 1.0, 1e-5);
                orthogonal_rows(direction, &b.transpose().to_owned(), 1.0, 1e-5);
                let by_a = product(product(g.as_ref(), a.transpose()).as_ref(), a.as_ref());
                let by_b = product(b.as_ref(), product(b.transpose(), g.as_ref()).as_ref());
                let step = Mat::from_fn(rows, cols, |i, j| by_a[(i, j)] + by_b[(i, j)]);
                close(direction, &step, &best, 2e-3);
            }
        }
    }

    #[test]
    fn lengths_are_those_of_the_scale() {
        for (rows, cols) in SIDES {
            let site = site(rows, cols, 1);
            let evidence = falling(rows, cols, 9);
            let stable = (rows as f64).powf(0.25) / 4.0;
            // Singular values 1, 0.7, 0.49 of the weight, and a scaling of 2.
            let roots = [1.0f64, 0.7, 0.49].map(|s| (s / 2.0).sqrt());
            let weight = roots.iter().sum::<f64>() / 3.0;
            for (scale, length) in SCALES.into_iter().zip([stable, 1.0, 0.5, weight]) {
                let config = config("lora-ga", RANK, &own("ArB2r", scale));
                let (a, b) = matrices(&factors_of(&config, &site, &evidence), RANK);
                orthogonal_rows(scale, &a, length, 1e-3);
                orthogonal_rows(scale, &b.transpose().to_owned(), length, 1e-3);
            }
        }
    }

    #[test]
    fn halves_are_disjoint() {
        let (site, evidence) = (site(20, 32, 1), falling(20, 32, 9));
        let g = mat(&evidence, 20, 32);
        let whole = svd(g.as_ref()).unwrap();
        for direction in DIRECTIONS {
            let config = config("lora-ga", RANK, &own(direction, "unit"));
            let (a, b) = matrices(&factors_of(&config, &site, &evidence), RANK);
            let (on_a, on_b) = (
                product(a.as_ref(), whole.v.as_ref()),
                product(b.transpose(), whole.u.as_ref()),
            );
            let places = |m: &Mat<f64>| -> Vec<usize> {
                let largest = |i: usize| {
                    let by = |x: &usize, y: &usize| m[(i, *x)].abs().total_cmp(&m[(i, *y)].abs());
                    (0..m.ncols()).max_by(by).unwrap()
                };
                (0..RANK).map(largest).collect()
            };
            let (in_a, in_b) = (places(&on_a), places(&on_b));
            let mut all = [&in_a[..], &in_b[..]].concat();
            all.sort_unstable();
            assert_eq!(all, (0..2 * RANK).collect::<Vec<_>>(), "{direction}");
            match direction {
                "ArB2r" => assert_eq!(in_a, [0, 1, 2]),
                "A2rBr" => assert_eq!(in_b, [0, 1, 2]),
                "ArBr" => assert_eq!((in_a, in_b), (vec![1, 3, 5], vec![0, 2, 4])),
                _ => {}
            }
        }
    }

    #[test]
    fn no_gradient_gives_plain_lora_and_a_broken_one_an_error() {
        let site = site(8, 12, 1);
        let config = config("lora-ga", RANK, &[]);
        let found = factors_of(&config, &site, &[0.0; 96]);
        assert!(found.b.iter().all(|v| *v == 0.0) && found.a.iter().any(|v| *v != 0.0));
        let mut broken = vec![1.0; 96];
        broken[5] = f32::NAN;
        let error = crate::adapter::start_factors(&config, &site, 7, &broken).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("layers.0.proj") && text.contains("NaN"),
            "{text}"
        );
    }
}
