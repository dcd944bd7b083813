//! Start values from inputs, from what quantization lost and with clipped products, against the stored
//! references.

use std::sync::Arc;

use tangent_linalg::{Mat, mat, product, to_rows};
use tangent_model::Site;
use tangent_ops::Quantization;
use tangent_peft::adapter::start_factors;
use tangent_peft::init::ranks::{Offer, redistributed, shares};
use tangent_peft::{AdapterConfig, Factors, SettingValue};
use tangent_testkit::{Reference, close, folder};

use crate::inits::{referenced, site, transposed, turned};

fn reference(name: &str) -> Reference {
    Reference::open(&folder("aligned").join(name))
}

fn started(config: &AdapterConfig, site: &Site, evidence: &[f32]) -> Factors {
    start_factors(config, site, 0, evidence).unwrap().factors
}

/// Asserts that factors are `{case}.A` and `{case}.B`, up to signs of their directions.
#[track_caller]
fn check_factors(stored: &Reference, case: &str, found: &Factors, rank: usize, tolerance: f32) {
    let (cols, rows) = (found.a.len() / rank, found.b.len() / rank);
    let want = stored.values(&format!("{case}.A"));
    close(case, &turned(&found.a, &want, cols), &want, tolerance);
    let want = transposed(&stored.values(&format!("{case}.B")), rank);
    let got = transposed(&found.b, rank);
    close(case, &turned(&got, &want, rows), &want, tolerance);
}

/// `from - 2 B A`.
fn left(from: &[f32], found: &Factors, rank: usize) -> Vec<f32> {
    let (cols, rows) = (found.a.len() / rank, found.b.len() / rank);
    let (a, b) = (mat(&found.a, rank, cols), mat(&found.b, rows, rank));
    let (from, moved) = (mat(from, rows, cols), product(b.as_ref(), a.as_ref()));
    let left = Mat::from_fn(rows, cols, |i, j| from[(i, j)] - 2.0 * moved[(i, j)]);
    to_rows(left.as_ref())
}

#[test]
fn inputs_give_the_directions_and_the_ranks_of_the_reference() {
    let stored = reference("eva.safetensors");
    let (rank, offered) = (2, 4);
    let mut offers = vec![];
    for (n, side) in [8, 6, 10].into_iter().enumerate() {
        let scatter = stored.values(&format!("{n}.scatter"));
        let site = site(vec![1.0; 5 * side], (5, side));
        for (whiten, name) in [(false, "A"), (true, "whitened")] {
            let own = [("whiten", SettingValue::Flag(whiten))];
            let Factors { a, b } = started(&referenced("eva", offered, &own), &site, &scatter);
            let want = stored.values(&format!("{n}.{name}"));
            close(name, &turned(&a, &want, side), &want, 1e-3);
            assert!(b.iter().all(|v| *v == 0.0));
            let shares = shares(&a, side, &scatter);
            let got: Vec<f32> = shares.iter().map(|share| *share as f32).collect();
            close("shares", &got, &stored.values(&format!("{n}.shares")), 1e-4);
            if !whiten {
                let site = n.to_string();
                offers.push(Offer { site, rank, shares });
            }
        }
    }
    let want: Vec<usize> = stored.values("ranks").iter().map(|r| *r as usize).collect();
    assert_eq!(redistributed(&offers), want);
}

#[test]
fn covariances_give_the_factors_of_the_reference() {
    let stored = reference("corda.safetensors");
    let rank = 2;
    for (n, sides) in [(7, 9), (9, 7)].into_iter().enumerate() {
        let w = stored.values(&format!("{n}.W"));
        let covariance = stored.values(&format!("{n}.covariance"));
        let site = site(w.clone(), sides);
        for mode in ["ipm", "kpm"] {
            let own = [("mode", SettingValue::text(mode))];
            let found = started(&referenced("corda", rank, &own), &site, &covariance);
            let case = format!("{n}.{mode}");
            check_factors(&stored, &case, &found, rank, 1e-4);
            let want = stored.values(&format!("{case}.residual"));
            close(&case, &left(&w, &found, rank), &want, 1e-5);
        }
    }
}

#[test]
fn what_quantization_lost_gives_the_factors_of_the_reference() {
    let stored = reference("loftq.safetensors");
    let rank = 3;
    for (n, sides) in [(10, 8), (6, 9)].into_iter().enumerate() {
        let w = stored.values(&format!("{n}.W"));
        let mut site = site(w.clone(), sides);
        let original = site.weight.clone();
        site.weight = original.quantize(Quantization::Int8).unwrap();
        site.original = Some(Arc::new(move || Ok(original.clone())));
        let held = site.weight.to_values();
        close("Q", &held, &stored.values(&format!("{n}.Q")), 1e-6);
        let found = started(&referenced("loftq", rank, &[]), &site, &w);
        check_factors(&stored, &n.to_string(), &found, rank, 1e-3);
        let lost: Vec<f32> = w.iter().zip(&held).map(|(w, q)| w - q).collect();
        let want = stored.values(&format!("{n}.left"));
        close("left", &left(&lost, &found, rank), &want, 1e-3);
    }
}

#[test]
fn clipping_keeps_products_below_the_weights_largest_entry() {
    let stored = reference("lora_ga.safetensors");
    let rank = 2;
    for (n, sides) in [(12, 9), (8, 11)].into_iter().enumerate() {
        let (g, w) = (
            stored.values(&format!("{n}.G")),
            stored.values(&format!("{n}.W")),
        );
        let found = |scale: &'static str, norm_clip: bool, size: f32| {
            let own = [
                ("scale", SettingValue::text(scale)),
                ("norm_clip", SettingValue::Flag(norm_clip)),
            ];
            let weight = w.iter().map(|v| size * v).collect();
            let site = site(weight, sides);
            started(&referenced("lora-ga", rank, &own), &site, &g)
        };
        let case = format!("{n}.clipped");
        check_factors(&stored, &case, &found("unit", true, 0.02), rank, 2e-3);
        assert_eq!(found("stable", true, 1.0), found("stable", false, 1.0));
        assert_ne!(found("unit", true, 0.02), found("unit", false, 0.02));
    }
}
