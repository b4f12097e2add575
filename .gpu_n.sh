export PYTHONUNBUFFERED=1 FLASHCORE_COMMIT=$1
nvidia-smi --query-gpu=name --format=csv,noheader | head -1
( export CUDA_VISIBLE_DEVICES=0
PYTHONPATH=$PWD TRITON_CACHE_DIR=/tmp/t0 timeout 110 python3 .trial/qreg.py qreg_main > /tmp/qreg_main.log 2>&1; echo "qreg main $? $SECONDS"
SPEC=spec01n PYTHONPATH=$PWD/.rows/q TRITON_CACHE_DIR=/tmp/t1 timeout 110 python3 .trial/qreg.py qreg_q > /tmp/qreg_q.log 2>&1; echo "qreg q $? $SECONDS"
) &
( export CUDA_VISIBLE_DEVICES=1
for t in main next q; do P=$PWD; [ $t != main ] && P=$PWD/.rows/$t
PYTHONPATH=$P TRITON_CACHE_DIR=/tmp/t2$t timeout 60 python3 .trial/ragged.py ragged_$t > /tmp/ragged_$t.log 2>&1; echo "ragged $t $? $SECONDS"
done ) &
( export CUDA_VISIBLE_DEVICES=2
for t in main next q; do P=$PWD; [ $t != main ] && P=$PWD/.rows/$t
PYTHONPATH=$P TRITON_CACHE_DIR=/tmp/t3$t timeout 80 python3 .trial/bias.py bias_$t > /tmp/bias_$t.log 2>&1; echo "bias $t $? $SECONDS"
done ) &
wait
for f in qreg_main qreg_q ragged_main ragged_next ragged_q bias_main bias_next bias_q; do echo "== $f"; tail -c 9000 /tmp/$f.log; done > $OUT/logs.txt
ls $OUT
