use proptest::prelude::*;

use super::*;

fn delay(text: &str) -> String {
    text.parse::<Delay>().unwrap().to_string()
}
fn ipi(text: &str) -> String {
    text.parse::<IpiFault>().unwrap().to_string()
}

#[test]
fn rules_are_read_as_a_person_writes_them() {
    for (written, means) in [
        ("flush-dispatch=50us", "flush-dispatch=50us"),
        (
            "flush-dispatch@0 : every 3 = 50us",
            "flush-dispatch@0:every3=50us",
        ),
        ("pte-clear:p0.1=0..200us", "pte-clear:p0.1=0..200us"),
        ("pte-clear:nth2=1ms", "pte-clear:nth2=1000us"),
        ("flush-sync=10us..1ms", "flush-sync=10us..1000us"),
        (
            "pte-clear@0=until:ipi-receive@1",
            "pte-clear@0=until:ipi-receive@1,10000us",
        ),
        (
            "pte-clear=until:frame-free,2ms",
            "pte-clear=until:frame-free,2000us",
        ),
    ] {
        assert_eq!(delay(written), means);
        assert_eq!(delay(means), means);
    }
    for (written, means) in [
        ("any=drop", "any=drop"),
        ("shootdown@0-1:p0.5=dup", "shootdown@0-1:p0.5=dup"),
        ("0xf1@any-1=reorder", "reschedule@any-1=reorder:1000us"),
        ("0x40=delay:0..50us", "0x40=delay:0..50us"),
    ] {
        assert_eq!(ipi(written), means);
        assert_eq!(ipi(means), means);
    }
}

#[test]
fn errors_name_the_token_and_what_is_allowed() {
    for (text, names, help) in [
        ("flush-dispatch", "'flush-dispatch'", "POINT[@VCPU]"),
        ("flush-dispach=50us", "'flush-dispach'", "'flush-dispatch'"),
        ("flush-sync@x=50us", "'x'", "a number"),
        ("flush-sync:often=50us", "'often'", "every3"),
        ("flush-sync:p2=50us", "'p2'", "p0.1"),
        ("flush-sync:every0=50us", "'every0'", "from 1"),
        ("flush-sync=50", "'50'", "50ms"),
        ("flush-sync=5s", "5s", "1s at most"),
        ("flush-sync=2ms..1ms", "2ms..1ms", "shorter"),
        ("flush-sync=until:x", "'x'", "one of"),
    ] {
        let refused = text.parse::<Delay>().unwrap_err().to_string();
        assert!(
            refused.contains(names) && refused.contains(help),
            "{refused}"
        );
    }
    for (text, names, help) in [
        ("nmi=drop", "'nmi'", "shootdown"),
        ("any@0=drop", "'0'", "FROM-TO"),
        ("any=lose", "'lose'", "dup"),
        ("any=drop:1ms", "'drop:1ms'", "reorder"),
        ("3=drop", "'3'", "16 to 255"),
    ] {
        let refused = text.parse::<IpiFault>().unwrap_err().to_string();
        assert!(
            refused.contains(names) && refused.contains(help),
            "{refused}"
        );
    }
}

#[test]
fn a_machine_must_have_the_vcpus_and_see_the_ipis() {
    let disturb = |delay: &str, ipi: &str| Disturb {
        delays: delay.parse().into_iter().collect(),
        ipis: ipi.parse().into_iter().collect(),
        seed: 0,
    };
    let refused = |disturb: Disturb, mode| disturb.check(2, mode).unwrap_err().to_string();
    use InterruptMode::{Controlled, Hardware};
    assert!(refused(disturb("flush-sync@2=1us", ""), Hardware).contains("no vCPU 2"));
    let until = "flush-sync=until:flush-sync@7";
    assert!(refused(disturb(until, ""), Hardware).contains("no vCPU 7"));
    assert!(refused(disturb("", "any@0-2=drop"), Controlled).contains("no vCPU 2"));
    assert!(refused(disturb("", "any=drop"), Hardware).contains("--interrupts controlled"));
    disturb("flush-sync@1=1us", "any@0-1=drop")
        .check(2, Controlled)
        .unwrap();
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "[a-z@:=.,0-9 -]{0,40}|\\PC{0,24}") {
        let _ = text.parse::<Delay>();
        let _ = text.parse::<IpiFault>();
    }

    #[test]
    fn what_is_written_is_read(
        point in 0usize..Point::ALL.len(), vcpu in prop::option::of(0usize..16),
        every in 1u64..99, least in 0u64..1000, more in 1u64..1000,
    ) {
        let span = Span {
            least: Duration::from_micros(least),
            most: Duration::from_micros(least + more),
        };
        let point = Point::ALL[point];
        let delay = Delay { point, vcpu, when: When::Every(every), hold: Hold::Time(span) };
        prop_assert_eq!(delay.to_string().parse(), Ok(delay));
        let fault = Fault::Delay(span);
        let ipi = IpiFault { vector: Some(0x55), from: vcpu, to: None, when: When::Nth(every), fault };
        prop_assert_eq!(ipi.to_string().parse(), Ok(ipi));
    }
}
