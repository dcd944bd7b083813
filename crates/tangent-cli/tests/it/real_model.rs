//! The real SmolLM2-135M-Instruct against reference values of transformers on the same weights.

use std::path::PathBuf;

use burn::tensor::Device;
use tangent_model::generate::{Sampling, argmax, generate};
use tangent_model::{BaseDtype, Batch, LanguageModel, Pass, forward};
use tangent_peft::{AdapterConfig, PeftError, attach, methods};
use tangent_train::plan::TrainedSite;

use crate::Place;

/// The file that the values belong to, or a loud note that these tests did not run.
pub fn path() -> Option<PathBuf> {
    let path = std::env::var_os("TANGENT_MODEL").map(PathBuf::from);
    let fits = |p: &PathBuf| p.to_string_lossy().ends_with("Q4_1.gguf");
    let Some(path) = path.filter(fits) else {
        eprintln!(
            "\n!!! SKIPPED: TANGENT_MODEL does not name SmolLM2-135M-Instruct.Q4_1.gguf; run \
             `cargo xtask test`, which fetches it\n"
        );
        return None;
    };
    Some(path)
}

/// Rows of some hundred tokens each.
pub fn long_rows(count: usize) -> String {
    let words = |row: usize| -> String {
        let words = (0..300).map(|word| format!("{} ", (word * 37 + row * 101) % 997));
        words.collect()
    };
    let rows = (0..count).map(|row| format!("{{\"text\": \"{}\"}}\n", words(row)));
    rows.collect()
}

fn open() -> Option<LanguageModel> {
    let device = Device::flex();
    path().map(|path| tangent_model::open(&path, BaseDtype::AsStored, &device).unwrap())
}

const TEXTS: [(&str, &[u32], f64, u32, f32); 2] = [
    (
        "The capital of France is Paris. The capital of Germany is Berlin.",
        &[
            504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 4521, 314, 11452, 30,
        ],
        1.71315,
        378,
        14.7522,
    ),
    (
        "Water boils at one hundred degrees Celsius.",
        &[12615, 36411, 418, 582, 3822, 5027, 20590, 30],
        5.53975,
        198,
        17.7528,
    ),
];

#[test]
fn ids_losses_and_last_logits_are_transformers() {
    let Some(opened) = open() else { return };
    let model = &*opened.model;
    for (text, ids, loss, next, logit) in TEXTS {
        let got = opened.tokenizer.encode(text).unwrap();
        assert_eq!(got, ids);
        let batch = Batch::new([(&got[..], &vec![true; got.len()][..])]);
        let scores = forward::log_probabilities(model, &batch);
        let mean = -scores.iter().map(|v| f64::from(*v)).sum::<f64>() / scores.len() as f64;
        assert!((mean - loss).abs() < 1e-3, "{mean} against {loss}");
        let pass = Pass::inference(&Device::flex());
        let last = forward::logits(model, &batch, &[got.len() - 1], &pass);
        let last = tangent_ops::values(last);
        assert_eq!(argmax(&last), next);
        let got = last[next as usize];
        assert!((got - logit).abs() < 2e-3, "{got} against {logit}");
    }
}

#[test]
fn greedy_text_is_transformers() {
    let Some(opened) = open() else { return };
    let prompt = opened.tokenizer.encode("The capital of Italy is").unwrap();
    let sampling = Sampling {
        max_new_tokens: 8,
        ..Sampling::default()
    };
    let mut streamed = String::new();
    let generated = generate(
        &*opened.model,
        &opened.tokenizer,
        &prompt,
        &sampling,
        &mut |piece| streamed.push_str(piece),
    )
    .unwrap();
    assert_eq!(generated.text, " Rome.\n\nThe Roman Empire was");
    assert_eq!(streamed, generated.text);
}

#[test]
fn rows_of_a_batch_never_see_each_other() {
    let Some(opened) = open() else { return };
    let rows: Vec<Vec<u32>> = TEXTS.iter().map(|t| t.1.to_vec()).collect();
    let all: Vec<Vec<bool>> = rows.iter().map(|r| vec![true; r.len()]).collect();
    let together = Batch::new(rows.iter().zip(&all).map(|(r, a)| (&r[..], &a[..])));
    let together = forward::log_probabilities(&*opened.model, &together);
    let alone: Vec<f32> = rows
        .iter()
        .zip(&all)
        .flat_map(|(r, a)| {
            let batch = Batch::new([(&r[..], &a[..])]);
            forward::log_probabilities(&*opened.model, &batch)
        })
        .collect();
    for (a, b) in together.iter().zip(&alone) {
        assert!((a - b).abs() < 1e-3, "{a} against {b}");
    }
}

#[test]
fn hidden_states_of_a_row_are_the_same_bits_in_every_batch() {
    let Some(mut opened) = open() else { return };
    let config = AdapterConfig {
        method: "lst".into(),
        ..AdapterConfig::default()
    };
    attach(&mut *opened.model, &config, 1).unwrap();
    let model = &*opened.model;
    let side = model.whole().side.clone().unwrap();
    // Longer than a sum that is formed in one go, with what others have in common with it.
    let long: Vec<u32> = (0..540).map(|i| 100 + i * 37 % 997).collect();
    let rows = [
        long.clone(),
        [&long[..200], &[7, 8, 9]].concat(),
        [&long[..200], &[7]].concat(),
        long[..1].to_vec(),
        vec![5, 6, 7],
        (0..90).collect(),
    ];
    let all: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let together = forward::states_of_rows(model, &*side, &all);
    for (row, together) in all.iter().zip(together) {
        let alone = forward::states_of_rows(model, &*side, &[row]).next();
        let tokens = row.len();
        assert!(alone == Some(together), "a row of {tokens} tokens");
    }
}

#[test]
fn methods_train_as_many_parameters_as_the_readme_says() {
    let Some(mut opened) = open() else { return };
    for row in crate::readme::methods() {
        let method = methods::find(&row.id).unwrap();
        let config = AdapterConfig {
            method: method.id.into(),
            rank: method.rank,
            alpha: 2.0 * method.rank as f32,
            targets: method.usual_targets(),
            ..AdapterConfig::default()
        };
        let count = if method.whole_model {
            let trained = TrainedSite::whole_model(&*opened.model);
            Some(trained.iter().map(|site| site.parameters).sum())
        } else {
            match attach(&mut *opened.model, &config, 1) {
                Ok(adapter) => Some(adapter.count()),
                // It has no bias.
                Err(PeftError::Site { .. }) => None,
                Err(error) => panic!("{}: {error}", row.id),
            }
        };
        assert_eq!(count, row.parameters, "{}", row.id);
    }
}

/// Its products are large enough for several threads.
#[test]
fn threads_change_no_byte_of_an_adapter() {
    let Some(model) = path() else { return };
    let place = Place::new();
    place.write("long.jsonl", long_rows(4));
    let trained = |threads: usize| {
        let line = format!(
            "train --model {} --data long.jsonl --max-length 64 --batch-size 2 --max-steps 2 \
             --output on-{threads} --threads {threads}",
            model.display()
        );
        place.run(&line).succeeded();
        place.read(&format!("on-{threads}/adapter_model.safetensors"))
    };
    assert!(trained(1) == trained(2));
}
