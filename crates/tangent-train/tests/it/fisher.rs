//! Importances of values are squared gradients of full fine-tuning, and a side network starts with
//! what they keep.

use burn::tensor::Device;
use tangent_model::{Batch, Pass, SiteKind};
use tangent_peft::{AdapterConfig, SettingValue, attach, attach_from};
use tangent_testkit::{close, folder, model};
use tangent_train::evidence::fisher::importances;
use tangent_train::evidence::{self, Evidence};
use tangent_train::gradients::{Accumulated, accumulate};

use crate::rows::examples;

const BASE: &str = "llama/everything";

#[test]
fn importances_are_squared_gradients_of_rows() {
    let rows = examples();
    let found = importances(&*model(&folder(BASE)), &rows);

    let mut model = model(&folder(BASE));
    let config = AdapterConfig {
        method: "full".into(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *model, &config, 0).unwrap();
    let mut squares: Vec<Vec<f32>> = vec![];
    for row in &rows {
        let batch = Batch::new([row.given()]);
        let mut gradients: Accumulated = vec![None; adapter.parameters.len()];
        accumulate(
            &*model,
            &batch,
            1.0 / batch.targets.len() as f32,
            &Pass::training(&Device::flex(), 0),
            false,
            &adapter.parameters,
            &mut gradients,
        );
        squares.resize_with(gradients.len(), Vec::new);
        for (sum, gradient) in squares.iter_mut().zip(gradients) {
            let gradient = gradient.unwrap();
            sum.resize(gradient.len(), 0.0);
            for (s, g) in sum.iter_mut().zip(gradient) {
                *s += g * g;
            }
        }
    }
    let want = |path: &str| {
        let name = format!("{path}.weight");
        let index = adapter.parameters.iter().position(|p| p.name() == name);
        &squares[index.unwrap()]
    };
    let mut compared = 0;
    for site in model.sites() {
        if site.kind == SiteKind::Linear {
            close(
                &site.path,
                &found.weights[&site.path],
                want(&site.path),
                1e-4,
            );
            compared += 1;
        }
    }
    assert_eq!(compared, found.weights.len());
    let mut features = vec![0.0; found.embedding.len()];
    for token in want("model.embed_tokens").chunks_exact(features.len()) {
        for (sum, v) in features.iter_mut().zip(token) {
            *sum += v;
        }
    }
    close("embedding", &found.embedding, &features, 1e-4);
}

#[test]
fn a_side_network_starts_with_parts_of_the_layers() {
    let rows = examples();
    let mut model = model(&folder(BASE));
    let mut config = AdapterConfig {
        method: "lst".into(),
        own: [
            ("reduction_factor".to_owned(), SettingValue::Number(4.0)),
            ("start".to_owned(), SettingValue::text("fisher")),
            ("fisher_rows".to_owned(), SettingValue::Number(2.0)),
        ]
        .into(),
        ..AdapterConfig::default()
    };
    assert_eq!(evidence::rows(&config).unwrap().most, 2);
    let looked_at = Evidence {
        batches: vec![vec![0, 1]],
        sparse: false,
    };
    let start = evidence::start(&mut *model, &mut config, &rows, &looked_at, 5).unwrap();
    let adapter = attach_from(&mut *model, &config, &start).unwrap();
    let whole: Vec<f32> = model
        .sites()
        .iter()
        .filter(|s| s.path.ends_with("layers.1.mlp.down_proj"))
        .flat_map(|s| s.weight.to_values())
        .collect();
    let name = "side.layers.1.mlp.down_proj.weight";
    let parameter = adapter.parameters.iter().find(|p| p.name() == name);
    let values = parameter.unwrap().values();
    assert!(values.iter().all(|v| whole.contains(v)));
    // Another seed changes what is random alone.
    let again = evidence::start(&mut *model, &mut config, &rows, &looked_at, 6).unwrap();
    assert_eq!(again.values, start.values);
    // Without training data there is nothing to begin with.
    let error = attach(&mut *model, &config, 0).err().unwrap().to_string();
    assert!(error.contains("gradients"), "{error}");
}
