//! Adapters of other methods as plain LoRA: exact where they can be, with the right error elsewhere.

use std::collections::BTreeMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tangent_linalg::{Mat, mat, svd};
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_model::{Pass, Site, read_json};
use tangent_peft::convert::{Conversion, to_lora};
use tangent_peft::{Adapter, AdapterConfig, BiasMode, Targets, attach, peft_format};
use tangent_testkit::{LoraCase, Reference, all_logits, close, folder, model};

/// A tiny model with its rows.
struct Place {
    base: &'static str,
    model: Box<dyn Model>,
    reference: Reference,
}

impl Place {
    /// The model of a stored adapter, and that adapter.
    fn of(method: &str, case: &str) -> (Self, Adapter) {
        let mut case = LoraCase::of(method, case);
        let adapter = peft_format::load(&mut *case.model, &case.dir).unwrap();
        let base = match case.description["base"].as_str().unwrap() {
            "base_tied" => "lora/base_tied",
            _ => "lora/base_biased",
        };
        let place = Self {
            base,
            model: case.model,
            reference: case.reference,
        };
        (place, adapter)
    }

    /// An adapter of random numbers on the model of a stored one.
    fn with(case: &str, config: &AdapterConfig) -> (Self, Adapter) {
        let (mut place, _) = Self::of("lora", case);
        let adapter = attach(&mut *place.model, config, 3).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for parameter in &adapter.parameters {
            parameter.update(|values| {
                for v in values {
                    *v += rng.random::<f32>() * 0.4 - 0.2;
                }
            });
        }
        (place, adapter)
    }

    fn logits(&self) -> Vec<f32> {
        all_logits(&*self.model, &self.reference.batch())
    }

    fn convert(&mut self, adapter: &Adapter, rank: Option<usize>) -> Conversion {
        to_lora(&mut *self.model, adapter, rank).unwrap()
    }

    /// What the attached adapter changes each weight by, by path.
    fn changes(&self) -> BTreeMap<String, Mat<f64>> {
        let pass = Pass::inference(&self.model.device());
        let sites = self.model.sites().into_iter();
        let change = |site: &Site| {
            let (rows, cols) = (site.weight.rows(), site.weight.cols());
            let adapter = site.attached().unwrap();
            if adapter.is_additive() {
                let zeros = vec![0.0; rows * cols];
                let zeros = tangent_ops::tensor(zeros, rows, cols, &pass.device);
                let change = tangent_ops::values(adapter.weight(zeros, &pass));
                return mat(&change, rows, cols);
            }
            let moved = tangent_ops::values(site.effective_weight(&pass));
            let frozen = mat(&site.weight.to_values(), rows, cols);
            &mat(&moved, rows, cols) - &frozen
        };
        sites
            .filter(|site| site.is_adapted())
            .map(|site| (site.path.clone(), change(site)))
            .collect()
    }

    /// Logits of a model that the converted adapter is read into from its files.
    fn logits_of_files(&self, converted: &Adapter) -> Vec<f32> {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("plain");
        let new = NewFolder::begin(&place, false).unwrap();
        peft_format::write(&new, converted, &*self.model, "base").unwrap();
        new.finish().unwrap();
        let json = read_json(&place.join("adapter_config.json")).unwrap();
        assert_eq!(json["peft_type"], "LORA");
        assert_eq!(json["lora_alpha"], json["r"]);
        assert_eq!(json["alpha_pattern"], json["rank_pattern"]);
        let mut again = model(&folder(self.base));
        let loaded = peft_format::load(&mut *again, &place).unwrap();
        assert_eq!(loaded.method.id, "lora");
        all_logits(&*again, &self.reference.batch())
    }
}

/// Settings of a method at these modules.
fn config(method: &str, rank: usize, targets: &[&str]) -> AdapterConfig {
    let targets: Vec<String> = targets.iter().copied().map(String::from).collect();
    AdapterConfig {
        method: method.into(),
        rank,
        alpha: 6.0,
        targets: Targets::parse(&targets),
        ..AdapterConfig::default()
    }
}

fn squares(m: &Mat<f64>) -> f64 {
    let columns = (0..m.ncols()).flat_map(|j| m.col_as_slice(j));
    columns.map(|v| v * v).sum()
}

/// Holds a report to the changes before and after, and these to the best that the rank allows.
#[track_caller]
fn holds(place: &Place, conversion: &Conversion, before: &BTreeMap<String, Mat<f64>>) {
    let after = place.changes();
    let (mut lost, mut energy) = (0.0, 0.0);
    for site in &conversion.sites {
        let change = &before[&site.path];
        assert_eq!(site.shape, change.shape(), "{}", site.path);
        let whole = squares(change);
        let left = squares(&(change - &after[&site.path]));
        let error = (left / whole).sqrt();
        let got = site.relative_error();
        assert!((got - error).abs() < 1e-5, "{}: {got} {error}", site.path);
        assert!((site.kept() - (1.0 - left / whole)).abs() < 1e-5);
        let values = svd(change.as_ref()).unwrap().s;
        let tail: f64 = values[site.rank..].iter().map(|s| s * s).sum();
        let best = (tail / whole).sqrt();
        assert!((error - best).abs() < 1e-4, "{}: {error} {best}", site.path);
        lost += left;
        energy += whole;
    }
    let error = (lost / energy).sqrt();
    assert!((conversion.relative_error() - error).abs() < 1e-5);
    assert!((conversion.kept() - (1.0 - lost / energy)).abs() < 1e-5);
}

#[test]
fn adalora_is_exact_with_the_ranks_that_are_left() {
    for case in ["mixed", "biased", "allocated"] {
        let (mut place, adapter) = Place::of("adalora", case);
        let before = place.logits();
        let conversion = place.convert(&adapter, None);
        close(case, &place.logits(), &before, 1e-6);
        assert!(conversion.relative_error() < 1e-6 && conversion.kept() > 0.999_999);
        assert_eq!(
            place.logits_of_files(&conversion.adapter),
            place.logits(),
            "{case}"
        );
        let ranks: Vec<usize> = conversion.sites.iter().map(|site| site.rank).collect();
        if case == "allocated" {
            assert_eq!(ranks, [2, 2, 3, 1, 4, 2, 2]);
            assert_eq!(conversion.ranks(), (1, 4));
            assert_eq!(conversion.left_out, ["model.layers.0.self_attn.v_proj"]);
            assert_eq!(conversion.adapter.config.rank, 4);
        } else {
            let rank = adapter.config.rank;
            assert!(ranks.iter().all(|r| *r == rank));
            assert!(conversion.adapter.config.rank_pattern.is_empty());
        }
    }
}

#[test]
fn one_rank_for_all_sites_is_exact_or_the_best_of_its_rank() {
    for (rank, exact) in [(5, true), (1, false)] {
        let (mut place, adapter) = Place::of("adalora", "allocated");
        let (before, changes) = (place.logits(), place.changes());
        let conversion = place.convert(&adapter, Some(rank));
        assert_eq!(conversion.ranks(), (rank, rank));
        assert!(conversion.adapter.config.rank_pattern.is_empty());
        holds(&place, &conversion, &changes);
        if exact {
            close("padded", &place.logits(), &before, 1e-6);
        }
    }
}

#[test]
fn factors_of_monarch_and_of_a_moved_base_are_taken_as_they_are() {
    let moved = AdapterConfig {
        init: "pissa".into(),
        ..config("lora", 2, &["q_proj", "down_proj"])
    };
    // Two ranks of each of Monarch's four blocks; what trains, and what was taken out of the base.
    for (config, rank) in [
        (config("monarch", 2, &["q_proj", "down_proj"]), 8),
        (moved, 4),
    ] {
        let (mut place, adapter) = Place::with("qv", &config);
        let before = place.logits();
        let conversion = place.convert(&adapter, Some(rank));
        assert!(conversion.relative_error() < 1e-6, "{}", config.method);
        close(&config.method, &place.logits(), &before, 1e-5);
        let (mut place, adapter) = Place::with("qv", &config);
        let changes = place.changes();
        let conversion = place.convert(&adapter, Some(1));
        assert!(conversion.relative_error() > 1e-3, "{}", config.method);
        holds(&place, &conversion, &changes);
    }
}

#[test]
fn loha_is_exact_at_its_whole_rank_and_by_itself_where_that_is_small() {
    let (mut place, adapter) = Place::with("qv", &config("loha", 3, &["q_proj", "down_proj"]));
    let before = place.logits();
    let conversion = place.convert(&adapter, Some(9));
    assert!(conversion.relative_error() < 1e-6);
    close("logits", &place.logits(), &before, 1e-5);
    close(
        "files",
        &place.logits_of_files(&conversion.adapter),
        &before,
        1e-5,
    );

    // Rank 4 at one site, 9 and more elsewhere: half the numbers of 32 x 32 are those of rank 8.
    let (mut place, adapter) = Place::of("loha", "mixed");
    let changes = place.changes();
    let conversion = place.convert(&adapter, None);
    holds(&place, &conversion, &changes);
    for site in &conversion.sites {
        let want = match site.path.as_str() {
            "model.layers.1.self_attn.q_proj" => 4,
            path if path.ends_with("down_proj") => 5,
            path if path.ends_with("gate_proj") => 9,
            _ => 3,
        };
        assert_eq!(site.rank, want, "{}", site.path);
        assert_eq!(
            site.relative_error() < 1e-5,
            matches!(want, 4 | 9),
            "{}",
            site.path
        );
    }
}

#[test]
fn what_is_lost_is_what_is_reported() {
    for (method, case) in [
        ("loha", "mixed"),
        ("lokr", "both"),
        ("vera", "mixed"),
        ("dora", "mixed"),
        ("oft", "cayley"),
        ("lora", "patterns"),
        ("lora", "embedding"),
    ] {
        let (mut place, adapter) = Place::of(method, case);
        let changes = place.changes();
        let conversion = place.convert(&adapter, Some(2));
        assert!(conversion.relative_error() > 1e-3, "{method}");
        assert_eq!(conversion.sites.len(), adapter.sites.len(), "{method}");
        holds(&place, &conversion, &changes);
        close(
            method,
            &place.logits_of_files(&conversion.adapter),
            &place.logits(),
            1e-6,
        );
    }
}

#[test]
fn dora_is_exact_at_the_whole_rank_of_its_weights() {
    let (mut place, adapter) = Place::with("qv", &config("dora", 4, &["k_proj", "v_proj"]));
    let before = place.logits();
    let conversion = place.convert(&adapter, Some(16));
    assert!(conversion.relative_error() < 1e-5);
    close("logits", &place.logits(), &before, 1e-5);

    let (mut place, adapter) = Place::with("qv", &config("dora", 4, &["k_proj", "v_proj"]));
    let changes = place.changes();
    let conversion = place.convert(&adapter, None);
    assert_eq!(conversion.ranks(), (4, 4));
    holds(&place, &conversion, &changes);
}

#[test]
fn what_trains_beside_factors_is_taken_over() {
    for (case, name) in [
        ("bias_all", "model.layers.0.self_attn.k_proj.bias"),
        (
            "bias_lora_only",
            "model.layers.0.self_attn.q_proj.base_layer.bias",
        ),
        ("modules_to_save", "lm_head.weight"),
        (
            "tokens",
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
        ("embedding", ""),
        ("lm_head", ""),
    ] {
        let (mut place, adapter) = Place::of("lora", case);
        let before = place.logits();
        let conversion = place.convert(&adapter, Some(4));
        let names = &conversion.taken_over;
        assert_eq!(names.is_empty(), name.is_empty(), "{case}: {names:?}");
        assert!(name.is_empty() || names.iter().any(|n| n == name), "{case}");
        close(case, &place.logits(), &before, 1e-5);
        let files = place.logits_of_files(&conversion.adapter);
        close(case, &files, &before, 1e-5);
    }
}

#[test]
fn biases_of_sites_without_triplets_stay() {
    for (bias, left_out) in [
        (BiasMode::None, 1),
        (BiasMode::All, 1),
        // Only those of adapted sites train.
        (BiasMode::LoraOnly, 0),
    ] {
        let config = AdapterConfig {
            bias,
            ..config("adalora", 2, &["q_proj", "v_proj"])
        };
        let (mut place, adapter) = Place::with("bias_all", &config);
        let name = "model.layers.1.self_attn.q_proj.lora_E";
        let e = adapter.parameters.iter().find(|p| p.name() == name);
        e.unwrap().set(vec![0.0; 2]);
        let before = place.logits();
        let conversion = place.convert(&adapter, None);
        assert_eq!(conversion.left_out.len(), left_out, "{bias:?}");
        close(bias.name(), &place.logits(), &before, 1e-6);
        let files = place.logits_of_files(&conversion.adapter);
        close(bias.name(), &files, &before, 1e-6);
    }
}

#[test]
fn what_plain_lora_has_no_place_for_is_refused_with_another_way() {
    for (method, targets, words) in [
        ("houlsby", &["mlp"][..], ["beside the weights", "--adapter"]),
        ("norms", &["norm"], ["normalizations", "merge"]),
        ("ia3", &["k_proj"], ["changes biases", "merge"]),
        (
            "select",
            &["q_proj", "q_proj.bias"],
            ["changes biases", "merge"],
        ),
    ] {
        let (mut place, adapter) = Place::with("bias_all", &config(method, 4, targets));
        let before = place.logits();
        let error = to_lora(&mut *place.model, &adapter, None).err().unwrap();
        for word in words {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        assert_eq!(place.logits(), before);
    }
    // Weights that train in place change by a matrix like any other.
    let (mut place, adapter) = Place::with("bias_all", &config("select", 4, &["v_proj"]));
    let before = place.logits();
    let conversion = place.convert(&adapter, Some(32));
    assert!(conversion.relative_error() < 1e-5);
    close("logits", &place.logits(), &before, 1e-5);
}

#[test]
fn what_cannot_be_converted_is_refused_and_stays_attached() {
    let loha = config("loha", 3, &["q_proj", "v_proj"]);
    let full = AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    for (config, rank, words) in [
        (&loha, Some(17), ["v_proj: rank 17", "1 and 16"]),
        (&loha, Some(0), ["rank 0", "1 and 32"]),
        (
            &config("lora", 4, &["q_proj"]),
            None,
            ["plain LoRA already", "--rank"],
        ),
        (&full, Some(4), ["method full", "a model of its own"]),
    ] {
        let (mut place, adapter) = Place::with("qv", config);
        let before = place.logits();
        let error = to_lora(&mut *place.model, &adapter, rank).err().unwrap();
        for word in words {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        assert_eq!(place.logits(), before);
    }
    for method in ["adalora", "loha", "vera"] {
        let (mut place, _) = Place::of("lora", "qv");
        let untrained = config(method, 4, &["q_proj"]);
        let untrained = attach(&mut *place.model, &untrained, 3).unwrap();
        let error = to_lora(&mut *place.model, &untrained, None).err().unwrap();
        assert!(error.to_string().contains("train it first"), "{error}");
    }
    let (mut place, adapter) = Place::with("qv", &loha);
    adapter.parameters[0].update(|values| values[5] = f32::NAN);
    let error = to_lora(&mut *place.model, &adapter, None).err().unwrap();
    let text = error.to_string();
    assert!(
        text.contains("q_proj") && text.contains("not finite"),
        "{text}"
    );
}
