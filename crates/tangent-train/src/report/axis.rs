//! Axes: where values go along a line, "nice" ticks, and numbers as short text.

/// What an axis or a color bar shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Axis {
    /// The quantity, such as `Loss`.
    pub title: String,
    /// Its unit, such as `nats per token`; empty if it has none.
    pub unit: String,
    /// Whether equal distances are equal ratios. Such an axis has positive values only.
    pub log: bool,
    /// Where the axis ends, if larger values shall not decide that; they are drawn at its end, and
    /// the chart says how many.
    pub ceiling: Option<f64>,
}

impl Axis {
    /// An axis whose equal distances are equal differences.
    pub fn linear(title: impl Into<String>, unit: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            unit: unit.into(),
            log: false,
            ceiling: None,
        }
    }

    /// An axis whose equal distances are equal ratios.
    pub fn logarithmic(title: impl Into<String>, unit: impl Into<String>) -> Self {
        Self {
            log: true,
            ..Self::linear(title, unit)
        }
    }

    /// The axis, which ends there.
    pub fn up_to(self, ceiling: Option<f64>) -> Self {
        Self { ceiling, ..self }
    }

    /// The value, or the end of the axis if it lies beyond.
    pub(super) fn held(&self, value: f64) -> f64 {
        match self.ceiling {
            Some(ceiling) if value > ceiling => ceiling,
            _ => value,
        }
    }

    /// What a chart says of the values that lie beyond the end; nothing if there are none.
    pub(super) fn beyond_note(&self, values: impl Iterator<Item = f64>) -> Option<String> {
        let ceiling = self.ceiling?;
        let beyond = values.filter(|value| self.shows(*value) && *value > ceiling);
        let (values, are) = match beyond.count() {
            0 => return None,
            1 => ("1 value".to_string(), "is"),
            count => (format!("{count} values"), "are"),
        };
        let end = number(ceiling);
        Some(format!(
            "{values} above {end} {are} drawn at the end of the axis: {}",
            self.title
        ))
    }

    /// Title, unit and kind, as they stand beside the axis.
    pub(super) fn caption(&self) -> String {
        let mut caption = self.title.clone();
        if !self.unit.is_empty() {
            caption.push_str(&format!(" ({})", self.unit));
        }
        if self.log {
            caption.push_str(", log scale");
        }
        caption
    }

    /// Whether a value has a place on such an axis.
    pub(super) fn shows(&self, value: f64) -> bool {
        shows(value, self.log)
    }
}

/// Largest magnitude on an axis, and the inverse of the smallest on a logarithmic one: spans of
/// larger numbers would overflow.
const LARGEST: f64 = 1e300;
const LARGEST_POWER: i32 = 300;
/// Magnitudes below count as zero.
const LEAST: f64 = 1e-290;
/// Spans below this share of the values count as none, and so do these parts of a power of ten:
/// labels that told such values apart would be longer than they are worth.
const LEAST_SPAN: f64 = 1e-4;
const LEAST_LOG_SPAN: f64 = 1e-3;
/// Free space at both ends, as a share of the values' span.
const PADDING: f64 = 0.04;

/// Whether a value has a place on a linear or a logarithmic axis.
pub fn shows(value: f64, log: bool) -> bool {
    if log {
        (1.0 / LARGEST..=LARGEST).contains(&value)
    } else {
        value.abs() <= LARGEST
    }
}

/// Maps values to places between 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// The value at 0, or its logarithm to base 10.
    low: f64,
    /// The value at 1, or its logarithm to base 10.
    high: f64,
    log: bool,
}

/// A marked value of an axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Tick {
    /// Where it is.
    pub value: f64,
    /// As text.
    pub label: String,
}

impl Scale {
    /// A scale that holds all values that it can show, with some space at both ends; any scale if
    /// there are none. Space does not reach below zero unless values do.
    pub fn covering(values: impl IntoIterator<Item = f64>, log: bool) -> Self {
        let shown = values.into_iter().filter(|v| shows(*v, log));
        let (low, high) = shown.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
            (low.min(v), high.max(v))
        });
        if low > high {
            let (low, high) = (0.0, 1.0);
            return Self { low, high, log };
        }
        if log {
            let (low, high) = (low.log10(), high.log10());
            let span = high - low;
            let padding = if span > LEAST_LOG_SPAN {
                span * PADDING
            } else {
                0.5
            };
            return Self {
                low: low - padding,
                high: high + padding,
                log,
            };
        }
        let size = low.abs().max(high.abs());
        let padding = if size <= LEAST {
            1.0
        } else if distinct(low, high) {
            (high - low) * PADDING
        } else {
            size * 0.1
        };
        let floor = if low >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
        Self {
            low: (low - padding).max(floor),
            high: high + padding,
            log,
        }
    }

    /// The linear scale from `low` to `high`, in whichever order, or around them if they are equal.
    pub fn exact(low: f64, high: f64) -> Self {
        let (low, high) = (low.min(high), low.max(high));
        if shows(low, false) && shows(high, false) && distinct(low, high) {
            let log = false;
            Self { low, high, log }
        } else {
            Self::covering([low, high], false)
        }
    }

    /// Where a value is: 0 at the low end, 1 at the high end.
    pub fn place(&self, value: f64) -> f64 {
        let value = if self.log { value.log10() } else { value };
        (value - self.low) / (self.high - self.low)
    }

    /// At most about `about + 1` ticks at 1, 2 and 5 times powers of ten.
    pub fn ticks(&self, about: usize) -> Vec<Tick> {
        if self.log {
            log_ticks(self.low, self.high, about)
        } else {
            linear_ticks(self.low, self.high, about)
        }
    }
}

fn distinct(low: f64, high: f64) -> bool {
    let size = low.abs().max(high.abs());
    size > LEAST && high - low > LEAST_SPAN * size
}

/// The least of 1, 2, 5 times powers of ten that goes into `span` at most `about` times.
pub fn nice_step(span: f64, about: usize) -> f64 {
    let rough = span / about.max(1) as f64;
    let power = power_of_ten(rough.log10().floor() as i32);
    let enough = |multiple: &f64| multiple * power >= rough * (1.0 - 1e-9);
    let multiple = [1.0, 2.0, 5.0].into_iter().find(enough);
    multiple.unwrap_or(10.0) * power
}

/// Read from text, since that is exact on every machine.
fn power_of_ten(exponent: i32) -> f64 {
    format!("1e{exponent}").parse().unwrap_or(f64::NAN)
}

fn linear_ticks(low: f64, high: f64, about: usize) -> Vec<Tick> {
    let step = nice_step(high - low, about);
    let first = (low / step - 1e-6).ceil();
    let last = (high / step + 1e-6).floor();
    let count = (last - first + 1.0).clamp(0.0, 100.0) as usize;
    let tick = |i: usize| {
        let value = (first + i as f64) * step;
        let label = linear_label(value, step, low.abs().max(high.abs()));
        Tick { value, label }
    };
    (0..count).map(tick).collect()
}

/// As many decimals for all ticks of an axis; `size` is the largest magnitude on it.
fn linear_label(value: f64, step: f64, size: f64) -> String {
    let place = exponent(step);
    if size < 1e6 && place >= -4 {
        let decimals = usize::try_from(-place).unwrap_or(0);
        format!("{value:.decimals$}")
    } else {
        let digits = usize::try_from(exponent(size) - place).unwrap_or(0);
        scientific(value, digits.min(15))
    }
}

/// `low` and `high` are logarithms to base 10.
fn log_ticks(low: f64, high: f64, about: usize) -> Vec<Tick> {
    let tick = |value: f64| Tick {
        value,
        label: log_label(value),
    };
    let first = ((low - 1e-9).ceil() as i32).max(-LARGEST_POWER);
    let last = ((high + 1e-9).floor() as i32).min(LARGEST_POWER);
    let decades = usize::try_from(last - first + 1).unwrap_or(0);
    if decades >= 3 {
        let every = decades.div_ceil(about.max(1));
        let powers = (first..=last).step_by(every).map(power_of_ten);
        return powers.map(tick).collect();
    }
    let multiples = (first - 1..=last).flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * power_of_ten(e)));
    let inside = (low - 1e-9)..=(high + 1e-9);
    let ticks: Vec<Tick> = multiples
        .filter(|value| inside.contains(&value.log10()))
        .map(tick)
        .collect();
    if ticks.len() >= 2 {
        return ticks;
    }
    // So short an axis is nearly linear.
    linear_ticks(10f64.powf(low), 10f64.powf(high), about.min(4))
}

fn log_label(value: f64) -> String {
    if (1e-3..1e5).contains(&value) {
        number(value)
    } else {
        scientific(value, 0)
    }
}

/// A number with four significant digits, as `0.0123`, `1500` or `2e-5`.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 {
        return "0".to_string();
    }
    if !(1e-3..1e6).contains(&size) {
        return scientific(value, 3);
    }
    let decimals = usize::try_from(3 - exponent(size)).unwrap_or(0);
    let text = format!("{value:.decimals$}");
    trimmed(&text).to_string()
}

/// `value` as `1.5e-4`, with at most `digits` decimals.
fn scientific(value: f64, digits: usize) -> String {
    if value == 0.0 {
        return "0".to_string();
    }
    let text = format!("{value:.digits$e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => format!("{}e{exponent}", trimmed(mantissa)),
        None => text,
    }
}

/// Without zeros at the end of decimals.
fn trimmed(number: &str) -> &str {
    if number.contains('.') {
        number.trim_end_matches('0').trim_end_matches('.')
    } else {
        number
    }
}

/// The place of the first digit: 0 for 1 to 9, -1 for 0.1 to 0.9.
fn exponent(positive: f64) -> i32 {
    (positive.log10() + 1e-9).floor() as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale, about: usize) -> Vec<String> {
        scale.ticks(about).into_iter().map(|t| t.label).collect()
    }

    fn log_scale(low: f64, high: f64) -> Scale {
        Scale {
            low: low.log10(),
            high: high.log10(),
            log: true,
        }
    }

    #[test]
    fn steps_are_one_two_or_five() {
        for (span, about, step) in [
            (1.0, 5, 0.2),
            (1.0, 4, 0.5),
            (10.0, 10, 1.0),
            (7.0, 5, 2.0),
            (90.0, 10, 10.0),
            (30_000.0, 5, 10_000.0),
            (3e-5, 6, 5e-6),
        ] {
            let got = nice_step(span, about);
            assert!((got / step - 1.0).abs() < 1e-12, "{span} {about}: {got}");
        }
    }

    #[test]
    fn linear_ticks_have_known_labels() {
        let cases = [
            (0.0, 1.0, 5, vec!["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
            (-1.0, 1.0, 4, vec!["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
            (13.0, 57.0, 5, vec!["20", "30", "40", "50"]),
            (0.0, 2e-5, 4, vec!["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
            (0.0, 3e6, 3, vec!["0", "1e6", "2e6", "3e6"]),
        ];
        for (low, high, about, expected) in cases {
            assert_eq!(labels(Scale::exact(low, high), about), expected);
        }
    }

    #[test]
    fn log_ticks_have_known_labels() {
        let rates = labels(log_scale(1e-5, 1e-2), 8);
        assert_eq!(rates, ["1e-5", "1e-4", "0.001", "0.01"]);
        let parameters = labels(log_scale(1e3, 1e12), 5);
        assert_eq!(parameters, ["1000", "1e5", "1e7", "1e9", "1e11"]);
        let decade = labels(log_scale(1e-4, 1e-3), 8);
        assert_eq!(decade, ["1e-4", "2e-4", "5e-4", "0.001"]);
        let part = labels(log_scale(2.1, 2.9), 8);
        assert_eq!(part, ["2.2", "2.4", "2.6", "2.8"]);
    }

    #[test]
    fn nearly_constant_values_have_short_labels() {
        let covering = |values: [f64; 2], log| labels(Scale::covering(values, log), 6);
        assert_eq!(
            covering([0.697_147, 0.697_149], false),
            ["0.65", "0.70", "0.75"]
        );
        for (low, share) in [
            (2.3, 2e-4),
            (7.1e-5, 3e-5),
            (1_234_567.0, 1e-6),
            (81.0, 1e-3),
        ] {
            for log in [false, true] {
                let labels = covering([low, low * (1.0 + share)], log);
                assert!(labels.len() >= 2);
                let short = |label: &String| label.len() <= 8;
                assert!(labels.iter().all(short), "{low} {share} {log}: {labels:?}");
            }
        }
    }

    #[test]
    fn values_beyond_the_end_are_held_and_told() {
        let axis = Axis::linear("Loss", "nats").up_to(Some(2.0));
        assert_eq!([1.0, 2.0, 9.0].map(|v| axis.held(v)), [1.0, 2.0, 2.0]);
        assert!(axis.held(f64::NAN).is_nan());
        let told = |values: &[f64]| axis.beyond_note(values.iter().copied());
        assert_eq!(told(&[1.0, 2.0, f64::NAN, f64::INFINITY]), None);
        assert_eq!(
            told(&[3.0]).unwrap(),
            "1 value above 2 is drawn at the end of the axis: Loss"
        );
        assert!(
            told(&[3.0, 1.0, 4.0])
                .unwrap()
                .starts_with("2 values above 2 are")
        );
        let open = Axis::linear("Loss", "nats");
        assert_eq!(open.held(9.0), 9.0);
        assert_eq!(open.beyond_note([9.0].into_iter()), None);
    }

    #[test]
    fn places_run_from_zero_to_one() {
        let log = log_scale(1e-6, 1e-2);
        for (value, place) in [(1e-6, 0.0), (1e-4, 0.5), (1e-2, 1.0)] {
            assert!((log.place(value) - place).abs() < 1e-12, "{value}");
        }
        let linear = Scale::covering([0.0, 100.0, f64::NAN, f64::INFINITY], false);
        assert_eq!(linear.place(0.0), 0.0);
        assert!((linear.place(100.0) - 1.0 / 1.04).abs() < 1e-12);
        assert_eq!(Scale::exact(3.0, 1.0), Scale::exact(1.0, 3.0));
    }

    #[test]
    fn odd_values_still_make_a_scale_with_ticks() {
        let cases: [&[f64]; 10] = [
            &[],
            &[0.0],
            &[5.0, 5.0],
            &[-5.0],
            &[f64::NAN],
            &[1e300, -1e300],
            &[1e-320, 0.0],
            &[1e-300, 1e300],
            &[1e15, 1e15 + 1.0],
            &[f64::MAX, 1.0],
        ];
        for values in cases {
            for log in [false, true] {
                let scale = Scale::covering(values.iter().copied(), log);
                let ticks = scale.ticks(6);
                assert!(
                    (2..=12).contains(&ticks.len()),
                    "{values:?} {log} {ticks:?}"
                );
                for tick in ticks {
                    let place = scale.place(tick.value);
                    assert!((-1e-5..=1.0 + 1e-5).contains(&place), "{values:?} {tick:?}");
                }
                for value in values.iter().filter(|v| shows(**v, log)) {
                    assert!((0.0..=1.0).contains(&scale.place(*value)), "{values:?}");
                }
            }
        }
        assert!(!shows(0.0, true) && !shows(-1.0, true) && shows(0.0, false));
        assert!(!shows(f64::NAN, false) && !shows(f64::NEG_INFINITY, false));
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (2.0, "2"),
            (0.012_346, "0.01235"),
            (-1.5, "-1.5"),
            (1500.0, "1500"),
            (123_456.7, "123457"),
            (2e-5, "2e-5"),
            (-1.2346e9, "-1.235e9"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn captions_name_unit_and_kind() {
        assert_eq!(Axis::linear("Loss", "nats").caption(), "Loss (nats)");
        let rate = Axis::logarithmic("Learning rate", "");
        assert_eq!(rate.caption(), "Learning rate, log scale");
    }
}
