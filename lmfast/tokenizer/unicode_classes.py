"""The Unicode character classes that the pre-splitting patterns use, pinned to Unicode 16.

Both engines read this one table, so that a piece boundary never depends on which Unicode
version an interpreter or a regular-expression library was built with. The classes agree with
tiktoken 0.14 and tokenizers 0.23 on every code point; those of the ``regex`` package and of older
``unicodedata`` modules do not.
"""

from __future__ import annotations

import base64
import functools
import zlib

OTHER, UPPER, LOWER, LETTER, MARK, NUMBER, SPACE, NEWLINE = range(8)
CLASS_NAMES = ("other", "Lu or Lt", "Ll", "Lm or Lo", "M", "N", "whitespace", "CR or LF")

# zlib of one varint per run of equal classes: (run length << 3) | class.
RUNS = (
    b"c-pmBZ)jWB73bXd>>TM{JJ)(I;n{i~&(TZw5-FfYHYl+SvgHglcEHSe;I&>SNCsw3!EFBEEeWWRJ2adRUYtQ1FW}V)n7"
    b"J!T)qyr=kk$L(RTPq%K~}Ah)eH=7hCvH-cx5|JcE&PjLsP;*_uo7BoO91T=Xb8sjl1{mo`%K=H+~nQAHYE49cWDR_#X5"
    b"d4IEqXH-Jap1?=(ppNaxcm_LD<ytbvOHfj#Ec`ePF9(@bc*1d6n`&vTYmnQ!cH3mGMX20)g=_qL-scnzuzf}2$Fay@9v"
    b"2dIt&%@*{Z=IvhFL?|4qCRX!A2#`a0{FsJ<_k2pe2(OUK0kVgd0n}nJlPOTJlz4BzQTokdBU4a^5}ak`3XaTI*~|LzzV"
    b"Iyuv1}gf@^7FwjOyxwre`tnj4fn3tUv;FCfcx!+gx0V*Q%MrI1Cic|SLKWE#p~S}!@vfU#u%D*FTAMOIWyei?XTP?s*|"
    b"z{Hf)XbW~CH$qa723?vwDJ%_x#G=U#$x%oXW7ZCz=8+T_v53<U@euO3s|Ur9iG3Kv9iA}B>O~Vx$tN@tl;-XDKgzZlYR"
    b"cl~jxOXK1A=4B2x7?4kfUa3M$kBAMGO;d@{bsMWh9a!9ZNu_d;3YG9oLb(Aw4C@F65+Sn`3ZW#WqWnZ1z-WB4c}2mYKf"
    b"&i912jMcS{ClW0Bz2Dz&bx$HEA)lQeu8+D~Vl2e41a5{U@EiuouFcKTbL80|?8KzMJT^Y(UUIIOO185(SrKfP7S=Rye@"
    b"GxFyX|bYI*mdA;G-iiPZfc33J$jl8*OoUK`W&D9kRfj=>ll)BA=H)`HB;=r^Rrl1sGC)#nZ5x=4zh5wP98Sao|9A1xC%"
    b"~1HCj{g8L-o{U=GcIo*AX%>X~_Ek{R6MLb_2mPxmg|Xt^#P)@PXDPEj4$0z7S<9&oE5!$WJ#T7~Gh7uXU+tVQJ{enRf1"
    b"jUznyFUTvAEp`!72FdBqm{mBVxod1ZGfziLx<=5QXY#nu@BEp`<}7J?6G9>;G?P0Yvn}O&{1RJalj^fhsi&gj&t60KVf"
    b"no5>F(L?3G!;x)BXM0Vo&!$3>=`k(n6iFPX^koo&!#8^71<Dbs9fqjag{mvcsV$8oi=iWO?veK1s;mOt@$qh;B=4L&Dy"
    b"WUj~{S-#*Ka*9a>Q6%PGP*;IcGg|9z^``>uA2B6J5;MV5B++nTx**iH9^*Yn%PdCW78TuW+Tvp<ILM%bL6CbBZ_9^4p)"
    b"<#QfSb-Dml+vx5Rjec22;yoTh6o+8T4(GZ$g!+K*}&XQIELq`FR}AkJ@<1Zt8T3Ouc%cfHzehYtIffevzOa=68RT#XnI"
    b"j~^##@^A6swvYJTE9kJlkylg>X+@ByO7SK4aZX%`ahEG|IM=MVZjMNou<m)yeW7?@Ww`iycJ2Hfanh#3UD!d-)2xddl2"
    b"8(`R5Y<!HOEi4AzFd^r7Iw(>ErqLxZxH+Q;0x~_UbHQ&zP`(tAL46=5iE6h=h!#4|qZjICSuc9K=6_q4SpsWHnVVLtd*"
    b"y0<fgQ~pbhsGAQS_kHD==&Ic~;pw4LMa7mD}u;HAzTEKQ)X?cm;MIVngLRqozp)udq|N3OEb2`K<iGG^^~&JYbpkl|1a"
    b"p?-J8U2boeP#7AJ|*#7i9G^84wB8xbLcZAU?JamWsp1sSeDw+5TX1&3zWtJq*d<%bwN3aQB#2?{N3>dVuq@{~6kh%>qT"
    b"xHm|pvI_1t}&`toO~va(XVR@k|(l?XO45I2pt5c1$9}m_Gqtxe8{Lu>5d&DWZnR2TH-_rHee4;TC*&LYoJ?)vQSh8iX?"
    b"3ooMSUkg05^`SuH8AD<fBxc*i`mlLW}In_xtczYTX9J_FAh-O#cSEGhN|xI9^e;r;jM*=65hi_kR(lwszga&G7$2u<f{"
    b"dxH(f#Yh?AZq%G-<LFvk=gC<nBu|?;WjtirsJrxDvu*$t6D-5&sL;fwQmaOI76;>7?6l)X?Z-+x>f5E=tJzLimkA>>G)"
    b"Og-W0C4xKfNae+8CjT8PV5akwP!zxRwZRLQc63R9};B!N0{4vcCi&eVXNzixg@@Zh=+U8G3C{g}o0Ikms!LTAeF=jh$P"
    b"lf0bQe*C3Okr$CBqScZ0rHk(xF8MmOO<PwQX&`HES;3t<^g4;=v<ik}qNuuegq?W`Kn{cCjxJZH8%O@Uy7aQ*Yj<2ZRs"
    b"fw)K@ZM$#F39sSTFJ2p%_C$`L7SzDODQmlGmK6<;);bjKJhEK$5xLN>OZT`!@RhE9j59ha;Yqc*tvnqKfzhDR~D5jTn4"
    b"vrrW}e>33j7fDmA1yGL%yi=}^YSE?fj>7P7$&X1E369rSmwQeROm!EY&Xdo-((%fygAw)}6FES^|lgQd6BQ0*#a0~36m"
    b"vXYO5l557?G*s%HQKK(DXz2OZm|L*^!Q?I2Y>OD}$zGY*1bfbB-rIEpGUVd=_o0M$;RCn}NAVJPBYL4rpKOwC*u9Tn<t"
    b"V=Btu|qs?4~TKjqm`KA#c3B^Z$PzgZv}ldw_?(sH1-cKU1>SEycR5B*mC0Km^ZakA0KB0nx(?4GFvmGT}MjsVaFUvb)G"
    b"PiB3uJo7bx#^03Bix6rx<)HYN>=kCJSIw@ia9B@&{6Nwe}Q+A1>z;a8^f27cVxc&Fl2Mo_oix5^k5b>gQkakeWMCsk+^"
    b"^~sL>yOBrd43Mn_y%zboFGO26wKMLTzQLbHJSUno@J{!7OghOnRPZcwW>^1pPRl4)wb!EEAKET_hXj*Q-w|L&i?f~{{b"
    b"xSat8"
)


@functools.lru_cache(maxsize=1)
def class_table() -> bytes:
    """The class of every code point, as 0x110000 bytes; surrogates are OTHER."""
    data = zlib.decompress(base64.b85decode(RUNS))
    table = bytearray()
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            table += bytes([value & 7]) * (value >> 3)
            value = shift = 0
    return bytes(table)


@functools.lru_cache(maxsize=32)
def class_ranges(*classes: int) -> str:
    """The code points of the given classes as the inside of a ``re`` character set."""
    table = class_table()
    wanted = bytes.maketrans(bytes(range(8)), bytes(int(k in classes) for k in range(8)))
    flags = table.translate(wanted)
    parts = []
    start = flags.find(1)
    while start >= 0:
        stop = flags.find(0, start)
        stop = len(flags) if stop < 0 else stop
        parts.append(f"\\U{start:08x}-\\U{stop - 1:08x}")
        start = flags.find(1, stop)
    return "".join(parts)
