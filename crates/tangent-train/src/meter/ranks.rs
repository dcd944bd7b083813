//! Ranks from the meter's readings: more where adapters lose most, for no more parameters in all.
//!
//! ```text
//! lost_i   = mean over the readings of (1 - kappa_i) ||G_i||^2 / sum over sites of ||G||^2
//! lost_i(r) ~ lost_i m_i / r        m_i: the rank at which it was read
//! ```
//!
//! What a site loses is taken to fall as one over its rank. From rank 1 everywhere, the site gains
//! a rank whose next one saves most for each of its `c_i` parameters, `lost_i m_i / (r (r + 1)
//! c_i)`, as long as the sum of the parameters is not above that of one rank for all. No rank is
//! above half of the smaller side of its weight. In the limit of large ranks, `r_i` is proportional
//! to `sqrt(lost_i m_i / c_i)`.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;
use tangent_peft::methods::{Common, lokr};
use tangent_peft::{AdapterConfig, Method};

use crate::error::TrainError;

/// The settings of a run, beside its readings.
const RUN: &str = "run.json";

/// A site that is to get a rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Path of the site.
    pub site: String,
    /// `(d_out, d_in)` of its weight.
    pub shape: (usize, usize),
    /// Parameters of one rank.
    pub cost: usize,
    /// Its share of all that gradients hold that its adapter loses, see [`lost_shares`].
    pub lost: f64,
    /// The rank at which it lost that.
    pub measured: usize,
}

impl Place {
    /// The largest rank that it may get.
    fn limit(&self) -> usize {
        (self.shape.0.min(self.shape.1) / 2).max(1)
    }

    /// What one more than `rank` saves, for each of its parameters.
    fn gain(&self, rank: usize) -> f64 {
        let at_rank_one = self.lost * self.measured as f64;
        at_rank_one / (rank as f64 * (rank as f64 + 1.0) * self.cost as f64)
    }
}

/// Whether ranks can move between the sites of a method for as many parameters: whether each site
/// has a rank of its own, and parameters in proportion to it. Those of LoKr have other sizes: one of
/// its factors has no rank, and the other none either where the rank is high.
pub fn can_move(method: &Method) -> bool {
    method.reads.contains(&Common::Patterns) && method.id != lokr::METHOD.id
}

/// The ranks of the run whose readings are in `metrics`, as the `run.json` beside it records them,
/// in settings of which nothing else is that run's. `None` if there is no such file, if it tells of
/// no rank, or if ranks moved between sites before the first step.
///
/// # Errors
/// If the file cannot be read or is malformed.
pub fn measured_ranks(metrics: &Path) -> Result<Option<AdapterConfig>, TrainError> {
    let path = metrics.with_file_name(RUN);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(TrainError::Io {
                action: "read",
                path,
                source,
            });
        }
    };
    let fault = |why: String| TrainError::Readings {
        path: path.clone(),
        why,
    };
    let settings: Value = serde_json::from_slice(&bytes).map_err(|e| fault(e.to_string()))?;
    let given = |name: &str, value: &Value| {
        let rank = value.as_u64().filter(|rank| *rank > 0);
        let rank = rank.and_then(|rank| usize::try_from(rank).ok());
        rank.ok_or_else(|| fault(format!("{name} has no rank")))
    };
    let rho = settings["set"]["rho"].as_str();
    let rho = rho.and_then(|rho| rho.parse::<f64>().ok());
    let is_moved = rho.is_some_and(|rho| rho > 1.0);
    let Some(rank) = settings.get("rank").filter(|_| !is_moved) else {
        return Ok(None);
    };
    let patterns = settings["rank_pattern"].as_object().into_iter().flatten();
    let patterns = patterns.map(|(name, rank)| Ok((name.clone(), given(name, rank)?)));
    Ok(Some(AdapterConfig {
        rank: given("the run", rank)?,
        rank_pattern: patterns.collect::<Result<_, TrainError>>()?,
        ..AdapterConfig::default()
    }))
}

/// Mean of what each site loses over the readings in a `metrics.jsonl`, as a share of all gradients
/// of a step, so that every step counts alike.
///
/// # Errors
/// If the file cannot be read, has no readings, or one is malformed.
pub fn lost_shares(path: &Path) -> Result<BTreeMap<String, f64>, TrainError> {
    let text = fs::read_to_string(path).map_err(|source| TrainError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    let fault = |why: String| TrainError::Readings {
        path: path.to_owned(),
        why,
    };
    let mut shares: BTreeMap<String, f64> = BTreeMap::new();
    let mut readings = 0;
    for (index, line) in text
        .lines()
        .enumerate()
        .filter(|(_, l)| !l.trim().is_empty())
    {
        let at = |why: &str| fault(format!("line {}: {why}", index + 1));
        let line: Value = serde_json::from_str(line).map_err(|e| at(&e.to_string()))?;
        let Some(meter) = line.get("meter") else {
            continue;
        };
        let sites = meter
            .as_object()
            .ok_or_else(|| at("\"meter\" is no object"))?;
        let mut step = vec![];
        for (site, values) in sites {
            let (lost, energy) = lost_and_energy(values)
                .ok_or_else(|| at(&format!("{site} lacks \"kappa\" or \"gradient_norm\"")))?;
            step.push((site, lost, energy));
        }
        let all: f64 = step.iter().map(|(_, _, energy)| energy).sum();
        if all > 0.0 {
            readings += 1;
            for (site, lost, _) in step {
                *shares.entry(site.clone()).or_default() += lost / all;
            }
        }
    }
    if readings == 0 {
        return Err(fault("no line has a reading of the meter".into()));
    }
    for share in shares.values_mut() {
        *share /= f64::from(readings);
    }
    Ok(shares)
}

/// `(1 - kappa) ||G||^2` and `||G||^2`.
fn lost_and_energy(values: &Value) -> Option<(f64, f64)> {
    let number = |name: &str| values.get(name)?.as_f64();
    let (kappa, norm) = (number("kappa")?, number("gradient_norm")?);
    let energy = norm * norm;
    Some(((1.0 - kappa).max(0.0) * energy, energy))
}

/// A rank for each place, of together no more parameters than with the rank `uniform` for all;
/// `uniform` for all if nothing is lost.
pub fn ranks(places: &[Place], uniform: usize) -> Vec<usize> {
    let uniform = uniform.max(1);
    if places.iter().all(|place| place.lost <= 0.0) {
        return vec![uniform; places.len()];
    }
    let mut ranks = vec![1; places.len()];
    let costs = places.iter().map(|place| place.cost);
    let mut left = costs.sum::<usize>() * (uniform - 1);
    loop {
        let open = places.iter().zip(&ranks).enumerate();
        let next = open
            .filter(|(_, (place, rank))| **rank < place.limit() && place.cost <= left)
            .map(|(index, (place, rank))| (index, place.gain(*rank)))
            .filter(|(_, gain)| *gain > 0.0)
            // The first of equals.
            .reduce(|best, other| if other.1 > best.1 { other } else { best });
        let Some((index, _)) = next else {
            return ranks;
        };
        let (Some(place), Some(rank)) = (places.get(index), ranks.get_mut(index)) else {
            return ranks;
        };
        *rank += 1;
        left -= place.cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(shape: (usize, usize), lost: f64) -> Place {
        Place {
            site: String::new(),
            shape,
            cost: shape.0 + shape.1,
            lost,
            measured: 8,
        }
    }

    fn parameters(places: &[Place], ranks: &[usize]) -> usize {
        places.iter().zip(ranks).map(|(p, r)| p.cost * r).sum()
    }

    #[test]
    fn equal_losses_keep_one_rank() {
        let places = vec![place((64, 64), 0.1); 5];
        assert_eq!(ranks(&places, 8), [8; 5]);
        let places = vec![place((64, 64), 0.0); 5];
        assert_eq!(ranks(&places, 8), [8; 5]);
    }

    #[test]
    fn ranks_follow_the_roots_of_the_losses() {
        let places: Vec<Place> = [1.0, 4.0, 9.0, 16.0]
            .map(|lost| place((400, 400), lost))
            .into();
        // Proportional to 1, 2, 3, 4 with a mean of 20.
        let got = ranks(&places, 20);
        for (got, want) in got.iter().zip([8usize, 16, 24, 32]) {
            assert!(got.abs_diff(want) <= 1, "{got} {want}");
        }
        assert_eq!(got.iter().sum::<usize>(), 80);
    }

    #[test]
    fn what_was_lost_at_a_higher_rank_counts_for_more() {
        let of = |measured: usize, cost: usize| Place {
            cost,
            measured,
            ..place((400, 400), 0.1)
        };
        // As if 1, 4, 9 and 16 times as much were lost at one rank.
        let places = [1, 4, 9, 16].map(|measured| of(measured, 800));
        for (got, want) in ranks(&places, 20).iter().zip([8usize, 16, 24, 32]) {
            assert!(got.abs_diff(want) <= 1, "{got} {want}");
        }
        // A rank that costs four times as much is half as high.
        let got = ranks(&[of(8, 800), of(8, 3200)], 20);
        // What is left in the end does for the cheaper one alone.
        assert!(got[0].abs_diff(2 * got[1]) <= 5, "{got:?}");
        assert!(800 * got[0] + 3200 * got[1] <= 20 * 4000, "{got:?}");
    }

    #[test]
    fn ranks_move_where_parameters_are_in_proportion() {
        let movable = tangent_peft::METHODS.iter().filter(|m| can_move(m));
        let movable: Vec<&str> = movable.map(|method| method.id).collect();
        assert_eq!(movable, ["lora", "dora", "loha"]);
    }

    #[test]
    fn ranks_of_a_run_are_those_that_it_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = dir.path().join("metrics.jsonl");
        assert!(measured_ranks(&metrics).unwrap().is_none());
        let read = |text: &str| {
            fs::write(dir.path().join(RUN), text).unwrap();
            measured_ranks(&metrics)
        };
        let text = r#"{"rank": 8, "rank_pattern": {"layers.1.q_proj": 2, "q_proj": 4}, "set": {}}"#;
        let run = read(text).unwrap().unwrap();
        let at = |path: &str| run.rank_at(path).unwrap();
        let of_layer = |layer: usize, name: &str| at(&format!("model.layers.{layer}.{name}"));
        assert_eq!(of_layer(1, "q_proj"), 2);
        assert_eq!((of_layer(0, "q_proj"), of_layer(0, "k_proj")), (4, 8));
        assert_eq!(read(r#"{"rank": 3}"#).unwrap().unwrap().rank, 3);
        // EVA has moved them, and where to is not recorded there.
        let moved = r#"{"rank": 8, "set": {"rho": "2"}}"#;
        assert!(read(moved).unwrap().is_none());
        assert!(read("{}").unwrap().is_none());
        for text in [
            "[",
            r#"{"rank": 0}"#,
            r#"{"rank": 4, "rank_pattern": {"q": "x"}}"#,
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains("run.json"), "{text}: {error}");
        }
    }

    #[test]
    fn bounds_hold_and_more_is_never_spent() {
        let mut state = 7u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        for uniform in [1, 2, 5, 16] {
            let places: Vec<Place> = (0..30)
                .map(|_| {
                    let side = |n: u64| n as usize + 1;
                    let shape = (side(random(90)), side(random(90)));
                    place(shape, random(1000) as f64 / 1000.0)
                })
                .collect();
            let got = ranks(&places, uniform);
            let spent = parameters(&places, &got);
            assert!(spent <= parameters(&places, &[uniform; 30]));
            for (place, rank) in places.iter().zip(&got) {
                assert!((1..=place.limit()).contains(rank));
            }
            // Of two equal shapes, the one that loses more has no lower rank.
            for (a, rank_a) in places.iter().zip(&got) {
                for (b, rank_b) in places.iter().zip(&got) {
                    assert!(a.shape != b.shape || a.lost <= b.lost || rank_a >= rank_b);
                }
            }
        }
    }

    #[test]
    fn shares_are_means_over_the_readings() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            lost_shares(&path)
        };
        let shares = read(
            "{\"step\":1,\"loss\":2.0}\n\
             {\"step\":1,\"meter\":{\"a\":{\"kappa\":0.5,\"gradient_norm\":1.0},\
             \"b\":{\"kappa\":0.0,\"cosine\":null,\"gradient_norm\":1.0}}}\n\n\
             {\"step\":2,\"meter\":{\"a\":{\"kappa\":0.75,\"gradient_norm\":8.0}}}\n",
        );
        let want = [("a".to_owned(), 0.25), ("b".to_owned(), 0.25)];
        assert_eq!(shares.unwrap(), BTreeMap::from(want));
        for (text, words) in [
            ("{\"step\":1}\n", "no line has a reading"),
            ("{\"step\":1\n", "line 1"),
            ("{\"meter\":{\"a\":{\"kappa\":1}}}", "a lacks"),
            ("{\"meter\":3}", "no object"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(
                error.contains(words) && error.contains("--meter"),
                "{error}"
            );
        }
    }
}
