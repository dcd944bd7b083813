//! Start values that quantize the base anew: those of the stored references, files that give the base
//! back to the bit, and the ways that lead away from it.

use std::path::Path;
use std::sync::Arc;

use tangent_linalg::{Mat, mat, product, to_rows};
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_model::{Pass, Site, read_json};
use tangent_ops::{FourBitType, FrozenMatrix, Quantization};
use tangent_peft::adapter::{chosen, start_factors, start_factors_of};
use tangent_peft::convert::to_lora;
use tangent_peft::{
    AdapterConfig, Factors, SettingValue, Start, Targets, attach, attach_from, detach, init, onto,
    peft_format,
};
use tangent_testkit::{Reference, all_logits, close, folder};

use crate::inits::{
    base, quantized_base, randomize, reference, referenced, site, transposed, turned,
};

/// Start values that give the base of quantized linear maps anew.
fn requantizing(method: &str, init: &str) -> AdapterConfig {
    AdapterConfig {
        method: method.into(),
        rank: 4,
        alpha: 6.0,
        init: init.into(),
        targets: Targets::parse(&["all-linear".into()]),
        rank_pattern: vec![("q_proj".into(), 2)],
        own: [("iterations".to_owned(), SettingValue::Number(2.0))].into(),
        ..AdapterConfig::default()
    }
}

/// Trains a little and writes the adapter of a quantized base with a base of its own.
fn requantized(config: &AdapterConfig, place: &Path) -> Box<dyn Model> {
    let mut model = quantized_base();
    let adapter = attach(&mut *model, config, 3).unwrap();
    randomize(&adapter);
    let new = NewFolder::begin(place, true).unwrap();
    peft_format::write(&new, &adapter, &*model, "base").unwrap();
    new.finish().unwrap();
    model
}

#[test]
fn files_give_back_a_base_that_was_quantized_anew() {
    let batch = reference().batch();
    for (method, init) in [("lora", "qpissa"), ("dora", "qpissa"), ("lora", "loftq")] {
        let out = tempfile::tempdir().unwrap();
        let place = out.path().join("adapter");
        let model = requantized(&requantizing(method, init), &place);
        let json = read_json(&place.join("adapter_config.json")).unwrap();
        assert_eq!(json["r"], 4);
        assert_eq!(json["use_dora"], method == "dora");
        assert_eq!(json["auto_mapping"]["base"], "base");
        let recorded = peft_format::trained_on(&place).unwrap().unwrap();
        assert!(recorded.rebased && !recorded.corrects);

        // To the bit.
        let mut again = quantized_base();
        let unadapted = all_logits(&*again, &batch);
        let loaded = peft_format::load(&mut *again, &place).unwrap();
        let want = all_logits(&*model, &batch);
        assert!(all_logits(&*again, &batch) == want, "{method} {init}");
        // Written once more, it is the same.
        let second = out.path().join("again");
        let new = NewFolder::begin(&second, false).unwrap();
        peft_format::write(&new, &loaded, &*again, "base").unwrap();
        new.finish().unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let read = |folder: &Path| std::fs::read(folder.join("base").join(file)).unwrap();
            assert!(read(&second) == read(&place), "{method} {init} {file}");
        }
        detach(&mut *again);
        assert!(all_logits(&*again, &batch) == unadapted, "{method} {init}");

        // What left the base is plain LoRA of the original model, and warns of none.
        let (mut residual, original) = (base("f32"), base("f32"));
        let taken = place.join("base");
        assert!(peft_format::trained_on(&taken).unwrap().is_none());
        let json = read_json(&taken.join("adapter_config.json")).unwrap();
        assert_eq!(json["peft_type"], "LORA");
        assert_eq!(json["use_dora"], false);
        let of_base = peft_format::load(&mut *residual, &taken).unwrap();
        assert_eq!(of_base.sites, loaded.sites);
        let pass = Pass::inference(&model.device());
        for (site, left) in model.sites().into_iter().zip(residual.sites()) {
            if let Some((weight, from)) = site.rebased() {
                let merged = tangent_ops::values(left.effective_weight(&pass));
                close(&site.path, &from().unwrap().to_values(), &merged, 1e-5);
                let kind = weight.quantization().unwrap();
                let matrix = FrozenMatrix::from_values(merged, weight.rows(), weight.cols());
                let codes = matrix.quantize(kind).unwrap().to_values();
                let same = codes
                    .iter()
                    .zip(weight.to_values())
                    .filter(|(a, b)| (**a - b).abs() < 1e-4);
                assert!(same.count() + 2 >= codes.len(), "{}", site.path);
            }
        }

        // No other base will do.
        for mut wrong in [original, base("q8_0")] {
            let error = peft_format::load(&mut *wrong, &place).err().unwrap();
            assert!(error.to_string().contains("--base-dtype nf4"), "{error}");
        }
        let mut lost = quantized_base();
        for site in lost.sites_mut() {
            site.original = None;
        }
        let error = peft_format::load(&mut *lost, &place)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("--base-dtype nf4"), "{error}");
        let error = peft_format::load_onto_merged(&mut *lost, &place)
            .err()
            .unwrap();
        assert!(error.to_string().contains("base of its own"), "{error}");
        std::fs::remove_file(taken.join("adapter_model.safetensors")).unwrap();
        let error = peft_format::load(&mut *quantized_base(), &place)
            .err()
            .unwrap();
        assert!(error.to_string().contains("base/adapter_model"), "{error}");
    }
}

#[test]
fn a_base_quantized_anew_is_nearer_to_the_original_and_leads_back_to_it() {
    let batch = reference().batch();
    let original = base("f32");
    let pass = Pass::inference(&original.device());
    let off = |model: &dyn Model| -> f32 {
        let pairs = model.sites().into_iter().zip(original.sites());
        let of_site = |(site, before): (&Site, &Site)| -> f32 {
            let values = tangent_ops::values(site.effective_weight(&pass));
            let pairs = values.into_iter().zip(before.weight.to_values());
            pairs.map(|(v, w)| (v - w) * (v - w)).sum()
        };
        pairs.map(of_site).sum()
    };
    let lost = off(&*quantized_base());
    for init in ["loftq", "qpissa"] {
        let mut model = quantized_base();
        let config = requantizing("lora", init);
        let adapter = attach(&mut *model, &config, 3).unwrap();
        let started = off(&*model);
        assert!(started < 0.8 * lost, "{init}: {started} {lost}");
        // Rows have the lengths of both together, not those of the rest.
        let mut directed = quantized_base();
        attach(&mut *directed, &requantizing("dora", init), 3).unwrap();
        let off = off(&*directed);
        assert!(
            (off - started).abs() < 1e-3 * started,
            "{init}: {off} {started}"
        );
        randomize(&adapter);

        // Merged onto the rest of the original weights, and as plain LoRA of these.
        let conversion = to_lora(&mut *model, &adapter, None).unwrap();
        assert!(conversion.relative_error() < 1e-5, "{init}");
        assert!(conversion.sites.iter().all(|site| site.rank <= 8));
        assert!(model.sites().iter().all(|site| site.original.is_none()));
        let converted = all_logits(&*model, &batch);
        let out = tempfile::tempdir().unwrap();
        let place = out.path().join("plain");
        let new = NewFolder::begin(&place, false).unwrap();
        peft_format::write(&new, &conversion.adapter, &*model, "base").unwrap();
        new.finish().unwrap();
        assert!(peft_format::trained_on(&place).unwrap().is_none());
        let mut plain = base("f32");
        peft_format::load(&mut *plain, &place).unwrap();
        close(init, &all_logits(&*plain, &batch), &converted, 1e-5);

        let mut restored = quantized_base();
        let again = attach(&mut *restored, &config, 3).unwrap();
        randomize(&again);
        let apart = onto::relative_difference(&*restored).unwrap().unwrap();
        assert!((1e-4..0.2).contains(&apart), "{init}: {apart}");
        onto::restore(&mut *restored).unwrap();
        close(init, &all_logits(&*restored, &batch), &converted, 1e-4);
    }
}

#[test]
fn directions_on_a_base_of_their_own_become_plain_lora_of_the_original() {
    let batch = reference().batch();
    let trained = || {
        let mut model = quantized_base();
        let adapter = attach(&mut *model, &requantizing("dora", "qpissa"), 3).unwrap();
        randomize(&adapter);
        (model, adapter)
    };
    let (mut model, adapter) = trained();
    // As many directions as any of the weights has.
    let conversion = to_lora(&mut *model, &adapter, Some(32)).unwrap();
    let error = conversion.relative_error();
    assert!(error < 1e-5, "{error}");
    let (mut restored, _) = trained();
    onto::restore(&mut *restored).unwrap();
    let (got, want) = (all_logits(&*model, &batch), all_logits(&*restored, &batch));
    close("plain LoRA", &got, &want, 1e-4);
}

#[test]
fn factors_that_were_computed_before_come_with_the_base_they_belong_to() {
    let batch = reference().batch();
    for init in ["loftq", "qpissa"] {
        let config = requantizing("lora", init);
        let mut model = quantized_base();
        let mut start = Start {
            seed: 3,
            ..Start::default()
        };
        let sites = model.sites();
        for site in chosen(&config, &sites).unwrap() {
            let whole = init::original(init::find(init).unwrap(), site).unwrap();
            let found = start_factors(&config, site, 3, &whole).unwrap();
            start.add(&site.path, found);
        }
        let alone = Start {
            factors: start.factors.clone(),
            seed: 3,
            ..Start::default()
        };
        let error = attach_from(&mut *model, &config, &alone).err().unwrap();
        let text = error.to_string();
        for part in ["model.layers.0", init, "Start::add"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        attach_from(&mut *model, &config, &start).unwrap();
        let mut want = quantized_base();
        attach(&mut *want, &config, 3).unwrap();
        assert!(
            all_logits(&*model, &batch) == all_logits(&*want, &batch),
            "{init}"
        );
    }
}

#[test]
fn bases_are_quantized_anew_as_in_the_references() {
    let stored = Reference::open(&folder("requantized/starts.safetensors"));
    let (rank, nf4) = (3, Quantization::FourBit(FourBitType::Nf4));
    for (n, (rows, cols)) in [(12, 20), (24, 16)].into_iter().enumerate() {
        let w = stored.values(&format!("{n}.W"));
        let whole = FrozenMatrix::from_values(w.clone(), rows, cols);
        let mut site = site(w.clone(), (rows, cols));
        site.weight = whole.quantize(nf4).unwrap();
        site.original = Some(Arc::new(move || Ok(whole.clone())));
        for (init, iterations) in [1, 2, 5].map(|i| [("qpissa", i), ("loftq", i)]).concat() {
            let case = format!("{n}.{init}.{iterations}");
            let own = [("iterations", SettingValue::Number(f64::from(iterations)))];
            let config = referenced(init, rank, &own);
            let start = start_factors_of(&config, &site, rank, 0, &w).unwrap();
            let like = |what: &str, found: &Factors| {
                let want_a = stored.values(&format!("{case}.{what}A"));
                let want_b = transposed(&stored.values(&format!("{case}.{what}B")), rank);
                close(&case, &turned(&found.a, &want_a, cols), &want_a, 1e-4);
                let b = transposed(&found.b, rank);
                close(&case, &turned(&b, &want_b, rows), &want_b, 1e-4);
            };
            like("", &start.factors);
            assert_eq!(start.taken.is_none(), (init, iterations) == ("loftq", 1));
            let base = match &start.taken {
                None => site.weight.to_values(),
                Some(taken) => {
                    let is_start = init == "qpissa";
                    assert_eq!(is_start, *taken == start.factors, "{case}");
                    like("taken_", taken);
                    let (b, a) = (mat(&taken.b, rows, rank), mat(&taken.a, rank, cols));
                    let moved = product(b.as_ref(), a.as_ref());
                    let whole = mat(&w, rows, cols);
                    let left = Mat::from_fn(rows, cols, |i, j| whole[(i, j)] - 2.0 * moved[(i, j)]);
                    let left = FrozenMatrix::from_values(to_rows(left.as_ref()), rows, cols);
                    left.quantize(nf4).unwrap().to_values()
                }
            };
            close(&case, &base, &stored.values(&format!("{case}.base")), 1e-5);
        }
    }
}
