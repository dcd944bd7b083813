//! Tests of what trains, told without the tensors themselves.

use tangent_peft::{AdapterConfig, SettingValue, Targets, attach};

use super::super::fixture::{self, usual};
use super::*;

#[test]
fn full_fine_tuning_is_told_without_attaching() {
    for base in ["llama/tied_gqa", "llama/everything"] {
        let mut model = fixture::model(base);
        let told = TrainedSite::whole_model(&*model);
        let adapter = attach(&mut *model, &fixture::full(), 1).unwrap();
        assert_eq!(told, TrainedSite::of_adapter(&*model, &adapter), "{base}");
        let count: usize = told.iter().map(|site| site.parameters).sum();
        assert_eq!(count, adapter.count());
        let own = told.iter().filter(|site| site.parameters > 0);
        let own: Vec<String> = own.map(|site| site.path.clone()).collect();
        assert_eq!(own, adapter.sites);
    }
}

#[test]
fn low_rank_sites_are_grouped_over_layers() {
    let mut model = fixture::model("llama/tied_gqa");
    let (trained, adapter) = fixture::attached(&mut *model, &fixture::lora(&["all-linear"]));
    let groups = SiteGroup::of(&trained);
    assert_eq!(groups.len(), 7);
    let q = &groups[0];
    assert_eq!((q.name.as_str(), q.shape, q.sites), ("q_proj", (32, 32), 2));
    assert_eq!(q.form, Form::LowRank { rank: 4 });
    assert_eq!(q.parameters, 2 * 4 * (32 + 32));
    let count: usize = groups.iter().map(|group| group.parameters).sum();
    assert_eq!(count, adapter.count());
    assert_eq!(lowest_layer(&trained, 2), 0);
    assert!(trained.iter().all(|site| site.replaced == 0));
}

/// What a reading takes of a weight with so many outputs and inputs.
type Reading = fn(usize, usize) -> Known;

#[test]
fn ranks_have_rows_and_columns_of_their_own_or_none() {
    let mut model = fixture::model("llama/tied_gqa");
    let methods: [(&str, Option<usize>, Option<Reading>); 6] = [
        ("lora", Some(1), None),
        // Lengths of rows do not grow with the rank.
        ("dora", Some(1), None),
        ("loha", Some(2), None),
        ("lokr", None, Some(|_, _| Known::Passes)),
        (
            "vera",
            None,
            Some(|d_out, d_in| Known::Products(4 * (d_out * d_in + 4 * (2 * d_out + d_in)))),
        ),
        (
            "adalora",
            None,
            Some(|d_out, d_in| Known::Products(5 * 4 * d_out * d_in)),
        ),
    ];
    for (method, times, known) in methods {
        let config = AdapterConfig {
            method: method.into(),
            ..fixture::lora(&["all-linear"])
        };
        let (trained, _) = fixture::attached(&mut *model, &config);
        for site in trained.iter().filter(|site| site.parameters > 0) {
            let want = times.map(|times| times * (site.shape.0 + site.shape.1));
            assert_eq!(site.of_one_rank(), want, "{method} {}", site.path);
            let known = known.map(|known| known(site.shape.0, site.shape.1));
            assert_eq!(site.known, known, "{method} {}", site.path);
        }
    }
    let whole = TrainedSite::whole_model(&*model);
    assert!(whole.iter().all(|site| site.of_one_rank().is_none()));
}

#[test]
fn virtual_tokens_train_through_all_layers() {
    let mut model = fixture::model("llama/tied_gqa");
    let projection = ("prefix_projection", SettingValue::Flag(true));
    // Keys and values of 16 features in both layers, or as many that give them.
    for (config, shape) in [
        (usual("prompt-tuning", &[]), (20, 32)),
        (usual("p-tuning", &[]), (20, 32)),
        (usual("prefix-tuning", &[]), (20, 2 * 2 * 16)),
        (usual("prefix-tuning", &[projection]), (20, 16)),
    ] {
        let (trained, adapter) = fixture::attached(&mut *model, &config);
        assert_eq!(trained.len(), 1, "{config:?}");
        assert_eq!(trained[0].form, Form::VirtualTokens(20));
        assert_eq!(trained[0].shape, shape);
        assert_eq!(trained[0].parameters, adapter.count());
        assert_eq!(lowest_layer(&trained, 2), 0);
        let rows = fixture::rows(&[10, 10]);
        let plan = fixture::draft(&*model, &trained, &rows)
            .plan(&crate::config::TrainConfig::default())
            .unwrap();
        assert_eq!(plan.trainable_parameters, adapter.count());
        assert_eq!(plan.largest_micro_batch, 40);
    }
}

#[test]
fn adapters_of_sub_layers_are_told_by_their_own_tensors() {
    let mut model = fixture::model("llama/tied_gqa");
    let size = ("bottleneck_size", SettingValue::Number(6.0));
    let config = AdapterConfig {
        modules_to_save: vec!["layers.0.mlp.up_proj".into()],
        ..usual("houlsby", &[size])
    };
    let (trained, adapter) = fixture::attached(&mut *model, &config);
    let own = 2 * 6 * 32 + 6 + 32;
    let told: Vec<(&str, Form, Option<usize>, usize)> = trained
        .iter()
        .map(|site| (site.name(), site.form, site.layer, site.parameters))
        .collect();
    let want = [
        ("up_proj", Form::Whole, Some(0), 48 * 32),
        ("self_attn", Form::Sublayer, Some(0), own),
        ("mlp", Form::Sublayer, Some(0), own),
        ("self_attn", Form::Sublayer, Some(1), own),
        ("mlp", Form::Sublayer, Some(1), own),
    ];
    assert_eq!(told, want);
    assert_eq!(adapter.count(), 4 * own + 48 * 32);
    let groups = SiteGroup::of(&trained);
    let attention = groups.iter().find(|g| g.name == "self_attn").unwrap();
    assert_eq!((attention.sites, attention.shape), (2, (6, 32)));
    let draft = Draft {
        adapter: &config,
        ..fixture::draft(&*model, &trained, &[])
    };
    let costs = costs(&draft).unwrap();
    // The input, and each hidden unit before and after the activation.
    let want = Cost {
        per_token: 32 + 2 * 6,
        trained_work: own,
        ..Cost::NOTHING
    };
    assert!(costs[1..].iter().all(|(_, cost)| *cost == want));
}

#[test]
fn a_network_beside_the_layers_is_in_none_of_them() {
    let mut model = fixture::model("llama/tied_gqa");
    let half = ("reduction_factor", SettingValue::Number(2.0));
    let config = usual("lst", &[half]);
    let (trained, adapter) = fixture::attached(&mut *model, &config);
    assert_eq!(trained.len(), 1);
    assert_eq!(trained[0].form, Form::Side);
    assert_eq!(trained[0].parameters, adapter.count());
    assert_eq!(
        lowest_layer(&trained, 2),
        2,
        "gradients flow through no layer"
    );
    let draft = Draft {
        adapter: &config,
        ..fixture::draft(&*model, &trained, &[])
    };
    let (_, cost) = costs(&draft).unwrap()[0];
    assert_eq!(cost.per_token, model.whole().side.as_ref().unwrap().kept());
    assert_eq!(cost.trained_work, adapter.count());
}

#[test]
fn weights_in_place_train_whole_or_by_their_bias() {
    let names = |targets: &[&str]| -> Vec<String> {
        targets.iter().map(|name| (*name).to_owned()).collect()
    };
    let chosen = AdapterConfig {
        targets: Targets::parse(&names(&["model.layers.1.*up_proj", "v_proj.bias"])),
        ..usual("select", &[])
    };
    for (config, forms) in [
        (usual("norms", &[]), vec![("norm", Form::Whole)]),
        (
            chosen,
            vec![("up_proj", Form::Whole), ("v_proj", Form::Bias)],
        ),
        (usual("bitfit", &[]), vec![("q_proj", Form::Bias)]),
        (usual("last-layers", &[]), vec![("q_proj", Form::Whole)]),
    ] {
        let mut model = fixture::model("llama/everything");
        let (trained, adapter) = fixture::attached(&mut *model, &config);
        for (name, form) in forms {
            let site = trained.iter().find(|site| site.name() == name).unwrap();
            assert_eq!(site.form, form, "{} {name}", config.method);
        }
        let count: usize = trained.iter().map(|site| site.parameters).sum();
        assert_eq!(count, adapter.count(), "{}", config.method);
        // They take the place of what is there.
        assert!(trained.iter().all(|site| site.replaced == site.parameters));
    }
}

#[test]
fn what_all_weights_share_is_told_once() {
    let mut model = fixture::model("llama/tied_gqa");
    let (trained, adapter) = fixture::attached(&mut *model, &usual("intrinsic", &[]));
    // Seven maps in each of two layers, and the vector.
    assert_eq!(trained.len(), 2 * 7 + 1);
    assert!(trained[..14].iter().all(|site| site.form == Form::Adapted));
    let vector = &trained[14];
    assert_eq!((vector.form, vector.shape), (Form::Shared, (1, 1000)));
    let count: usize = trained.iter().map(|site| site.parameters).sum();
    assert_eq!((count, adapter.count()), (1000, 1000));
    assert_eq!(lowest_layer(&trained, 2), 0);
}

#[test]
fn other_forms_are_told_from_the_tensors() {
    let mut model = fixture::model("llama/tied_gqa");
    let config = AdapterConfig {
        modules_to_save: vec!["model.norm".into()],
        trainable_tokens: [("embed_tokens".to_owned(), vec![3, 5])].into(),
        ..fixture::lora(&["model.layers.1.*q_proj"])
    };
    let (trained, adapter) = fixture::attached(&mut *model, &config);
    let told: Vec<(&str, Form, usize)> = trained
        .iter()
        .map(|site| (site.name(), site.form, site.replaced))
        .collect();
    let want = [
        ("embed_tokens", Form::Rows(2), 2 * 32),
        ("q_proj", Form::LowRank { rank: 4 }, 0),
        ("norm", Form::Whole, 32),
        ("lm_head", Form::Rows(2), 0),
    ];
    assert_eq!(told, want);
    let count: usize = trained.iter().map(|site| site.parameters).sum();
    assert_eq!(count, adapter.count());
}

#[test]
fn every_method_has_its_form() {
    let mut model = fixture::model("llama/everything");
    for method in tangent_peft::METHODS {
        let blocks = ("oft_block_size", SettingValue::Number(8.0));
        let config = AdapterConfig {
            rank: 4,
            ..match method.id {
                "oft" => usual("oft", &[blocks]),
                id => usual(id, &[]),
            }
        };
        let (trained, adapter) = fixture::attached(&mut *model, &config);
        let count: usize = trained.iter().map(|site| site.parameters).sum();
        assert_eq!(count, adapter.count(), "{}", method.id);
        let is_usual = |site: &TrainedSite| match (method.attach, site.form) {
            (Attach::Weight(_), Form::Whole) => method.whole_model,
            (Attach::Weight(_), Form::LowRank { rank }) => rank == 4,
            (Attach::Weight(_), form) => matches!(form, Form::Adapted | Form::Shared),
            (Attach::Activation(_), form) => form == Form::Sublayer,
            (Attach::Prefix(_), form) => matches!(form, Form::VirtualTokens(_)),
            (Attach::Side(_), form) => form == Form::Side,
            (Attach::Select(_), form) => matches!(form, Form::Whole | Form::Bias),
        };
        assert!(
            !trained.is_empty() && trained.iter().all(is_usual),
            "{}",
            method.id
        );
        // VeRA's projections, (4, 64) and (64, 4).
        let shared: usize = trained.iter().map(|site| site.shared).sum();
        let want = if method.id == "vera" {
            4 * (64 + 64)
        } else {
            0
        };
        assert_eq!(shared, want, "{}", method.id);
    }
}

#[test]
fn what_trains_along_is_told_with_its_own_costs() {
    let mut model = fixture::model("llama/tied_gqa");
    let config = |method: &str, targets: &[&str]| AdapterConfig {
        method: method.into(),
        ..fixture::lora(targets)
    };
    let configs = [
        config("lora", &["q_proj"]),
        config("dora", &["down_proj"]),
        config("houlsby", &["mlp"]),
        config("norms", &["norm"]),
    ];
    let start = tangent_peft::Start::default();
    let adapter = tangent_peft::attach_all(&mut *model, &configs, &start).unwrap();
    let trained = TrainedSite::of_adapter(&*model, &adapter);
    let told: Vec<(&str, Form, usize)> = trained
        .iter()
        .map(|site| (site.name(), site.form, site.part))
        .collect();
    let thin = Form::LowRank { rank: 4 };
    let layer = [("q_proj", thin, 0), ("down_proj", thin, 1)];
    let others = [
        ("norm", Form::Whole, 3),
        ("mlp", Form::Sublayer, 0),
        ("mlp", Form::Sublayer, 0),
    ];
    assert_eq!(told, [&layer[..], &layer[..], &others[..]].concat());
    let count: usize = trained.iter().map(|site| site.parameters).sum();
    assert_eq!(count, adapter.count());
    let draft = Draft {
        adapter: &configs[0],
        also: &configs[1..],
        ..fixture::draft(&*model, &trained, &[])
    };
    let costs = costs(&draft).unwrap();
    // DoRA forms lengths of rows, LoRA does not.
    assert_eq!((costs[0].1.per_pass, costs[1].1.per_pass), (0, 2 * 32));
    let network = costs[5].1;
    assert!(network.per_token > 0 && network.trained_work == trained[5].parameters);
    assert_eq!(lowest_layer(&trained, 2), 0);
}
