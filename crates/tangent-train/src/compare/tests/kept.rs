//! What a comparison keeps in its folder, and what of that another one uses.

use tangent_ops::FrozenMatrix;

use super::*;

/// LoRA's run alone.
fn lora_alone(setup: &mut Setup<'_>) {
    one_run(setup);
    setup.recipes.truncate(1);
}

/// Compares; the finished runs that were told to be of no use, of how many, and the runs made.
fn unused(place: &mut Place, change: fn(&mut Setup<'_>)) -> (Option<(usize, usize)>, usize) {
    let mut told = None;
    let compared = place.compare(change, |event, _| {
        if let Event::Unused { unused, finished } = event {
            told = Some((*unused, *finished));
        }
    });
    let (_, made) = compared.unwrap();
    (told, made)
}

#[test]
fn readings_of_the_meter_are_part_of_no_run_s_key() {
    let mut place = Place::new();
    let (report, made) = place.compare(lora_alone, |_, _| {}).unwrap();
    assert_eq!(made, 1);
    for readings in [0, 2, 3] {
        let change = |setup: &mut Setup<'_>| {
            lora_alone(setup);
            setup.readings = readings;
        };
        let (again, made) = place.compare(change, |_, _| {}).unwrap();
        assert_eq!((made, &again.standings), (0, &report.standings));
    }
}

#[test]
fn runs_of_other_settings_or_weights_are_told_and_not_used() {
    let mut place = Place::new();
    place.compare(one_run, |_, _| {}).unwrap();
    let more: fn(&mut Setup<'_>) = |setup| {
        one_run(setup);
        setup.recipes.extend(find(&["rslora".to_owned()]).unwrap());
    };
    assert_eq!(unused(&mut place, one_run), (None, 0));
    assert_eq!(unused(&mut place, more), (None, 1));
    let longer: fn(&mut Setup<'_>) = |setup| {
        one_run(setup);
        setup.shared.train.length = Length::Steps(9);
    };
    assert_eq!(unused(&mut place, longer), (Some((2, 3)), 2));
    // Three of the comparison with rslora, two of the longer one.
    for site in place.model.sites_mut() {
        let values = site.weight.to_values();
        let values = values.iter().map(|v| 1.1 * v).collect();
        let (rows, cols) = (site.weight.rows(), site.weight.cols());
        site.weight = FrozenMatrix::from_values(values, rows, cols);
    }
    assert_eq!(unused(&mut place, longer), (Some((4, 5)), 2));
}

#[test]
fn an_earlier_comparison_is_there_until_another_one_begins() {
    let mut place = Place::new();
    let again: fn(&mut Setup<'_>) = |setup| {
        one_run(setup);
        setup.overwrite = true;
    };
    assert_eq!(place.compare(again, |_, _| {}).unwrap().1, 2);
    let files = [LEDGER, REPORT].map(|name| place.read(name));
    let refused = place.compare(
        |setup| {
            again(setup);
            setup.budget = Budget::Parameters(10);
        },
        |_, _| {},
    );
    assert!(matches!(refused, Err(CompareError::NoRecipe { .. })));
    place.validation.clear();
    let refused = place.compare(
        |setup| {
            again(setup);
            setup.rates = Rates::Auto;
        },
        |_, _| {},
    );
    assert!(matches!(refused, Err(CompareError::Rows { .. })));
    // While the pace of recipes is measured, nothing is given up.
    let measured = place.compare(
        |setup| {
            again(setup);
            setup.budget = Budget::Minutes(10.0);
        },
        |event, stop| {
            let is_second = matches!(event, Event::Begin { recipe: "full", .. });
            stop.store(is_second, Ordering::Relaxed);
        },
    );
    assert!(matches!(measured, Err(CompareError::NotBegun)));
    place.stop.store(false, Ordering::Relaxed);
    assert_eq!([LEDGER, REPORT].map(|name| place.read(name)), files);
    let stopped = place.compare(again, |event, stop| {
        stop.store(matches!(event, Event::Begin { .. }), Ordering::Relaxed);
    });
    let (report, made) = stopped.unwrap();
    assert_eq!((report.complete, made), (false, 0));
    assert!(place.records().is_empty());
    place.stop.store(false, Ordering::Relaxed);
    assert_eq!(place.compare(again, |_, _| {}).unwrap().1, 2);
    assert_eq!(place.compare(again, |_, _| {}).unwrap().1, 2);
    assert_eq!(place.records().len(), 2);
}

#[test]
fn an_error_names_its_recipe_and_leaves_a_page_of_what_is_finished() {
    let mut place = Place::new();
    for site in place.model.sites_mut() {
        if site.path.ends_with("1.mlp.down_proj") {
            let (rows, cols) = (site.weight.rows(), site.weight.cols());
            let values = vec![f32::NAN; rows * cols];
            site.weight = FrozenMatrix::from_values(values, rows, cols);
        }
    }
    let broken = |setup: &mut Setup<'_>| {
        one_run(setup);
        setup.recipes = find(&["lora".to_owned(), "pissa".to_owned()]).unwrap();
    };
    let text = place.compare(broken, |_, _| {}).unwrap_err().to_string();
    assert!(text.starts_with("pissa: "), "{text}");
    for part in ["down_proj", "leave pissa out of --methods"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(place.records()[0].diverged, Some(1));
    let page = String::from_utf8(place.read(REPORT)).unwrap();
    for words in [
        "It ended with an error: pissa: ",
        "diverged at every learning rate",
        "--resume",
    ] {
        assert!(page.contains(words), "{words}");
    }
}
