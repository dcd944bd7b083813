//! Scores of targets against all logits.

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_model::{Batch, Pass, SiteKind, WeightAdapter, forward};
use tangent_ops::cross_entropy::CHUNK;
use tangent_testkit::{close, folder, model};

/// A head of one and a half times the weight, computed from it or a tensor of its own.
struct Larger {
    own: Option<Tensor<2>>,
}

impl WeightAdapter for Larger {
    fn weight(&self, base: Tensor<2>, _pass: &Pass) -> Tensor<2> {
        base * 1.5
    }

    fn replacement(&self, _pass: &Pass) -> Option<Tensor<2>> {
        self.own.clone()
    }
}

#[test]
fn scores_are_those_of_all_logits_whatever_the_head_is() {
    // Rows that begin alike, and every other one is the one before it.
    let row = |i: u32| -> Vec<u32> { (0..10).map(|t| (t * t + i / 2 * t) % 96).collect() };
    let rows: Vec<Vec<u32>> = (0..40).map(row).collect();
    let every = [true; 10];
    let batch = Batch::new(rows.iter().map(|row| (&row[..], &every[..])));
    assert!(batch.targets.len() > CHUNK, "several chunks");
    let places: Vec<usize> = batch.targets.iter().map(|target| target.token).collect();
    for (head, is_adapted, is_own) in [
        ("frozen", false, false),
        ("adapted", true, false),
        ("trained", true, true),
    ] {
        let mut model = model(&folder("llama/tied_gqa"));
        let pass = Pass::inference(&model.device());
        let mut sites = model.sites_mut().into_iter();
        let site = sites.find(|site| site.kind == SiteKind::Head).unwrap();
        if is_adapted {
            let own = is_own.then(|| site.weight.dense(&pass.device) * 1.5);
            site.attach(Arc::new(Larger { own }));
        }
        drop(sites);
        let logits = tangent_ops::values(forward::logits(&*model, &batch, &places, &pass));
        let mut want = vec![];
        for (logits, target) in logits.chunks_exact(96).zip(&batch.targets) {
            let sum: f64 = logits.iter().map(|v| f64::from(*v).exp()).sum();
            want.push(logits[target.id as usize] - sum.ln() as f32);
            want.extend([logits[5], logits[95]]);
        }
        let got = forward::target_scores(&*model, &batch, &[5, 95]);
        close(head, &got, &want, 2e-5);
        let alone = forward::log_probabilities(&*model, &batch);
        assert!(got.iter().step_by(3).eq(&alone), "{head}");
        let nothing = Batch::new([(&rows[0][..], &[false; 10][..])]);
        assert!(forward::target_scores(&*model, &nothing, &[5]).is_empty());
    }
}
